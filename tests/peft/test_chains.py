"""A method on what another one left: earlier tasks stand still, and nothing that was learned is written over."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import FAMILIES, SETTINGS, base_of, logits, method_of, moved, texts
from operations import apart
from small import random_weights

from xylem import models, peft
from xylem.errors import ConfigError
from xylem.models import bert
from xylem.models.settings import Compute
from xylem.peft import compose
from xylem.peft import config as configs
from xylem.peft.calls import METHODS
from xylem.peft.methods import adalora
from xylem.peft.saving import arrays, fingerprint, load_adapter, save_adapter
from xylem.peft.tree import partition, split, unsplit
from xylem.training.optimizers import decays


def taught(config, base, seed):
    """The base after a task: a graft that looks learned."""
    method, key = METHODS[config.name], jax.random.key(seed)
    grafted = method.graft(base, key, config)
    return moved(grafted, method.trainable(grafted, config), key)


IN_MLP = {"targets": "mlp/(up|down)/kernel"}
SECOND = {
    "olora": (configs.LoRAConfig(2), configs.OLoRAConfig(2, **IN_MLP), ("a", "b")),
    "adalora": (configs.AdaLoRAConfig(3, 2), configs.AdaLoRAConfig(3, 2, **IN_MLP), ("a", "b", "values")),
    "ia3": (configs.IA3Config(), configs.IA3Config("mlp/up/kernel", "mlp/down/kernel"), ("stretch",)),
    "dora": (configs.QLoRAConfig(2, kind="int8"), configs.DoRAConfig(2, **IN_MLP), ("base/a", "base/b", "magnitude")),
}


@pytest.mark.parametrize("name", SECOND)
def test_what_an_earlier_task_taught_stands_still(name, rng_seed):
    """The second task's targets are two matrices, the first's all."""
    first, second, fields = SECOND[name]
    before = taught(first, base_of("llama", rng_seed), rng_seed)
    grafted = METHODS[name].graft(before, jax.random.key(rng_seed), second)
    trainable, _ = partition(grafted, METHODS[name].trainable(grafted, second))
    wanted = {f"layers/mlp/{matrix}/kernel/{field}" for matrix in ("up", "down") for field in fields}
    assert set(arrays(trainable)) == wanted
    optimizer = METHODS[name].optimizer(optax.sgd(0.1), second, 9)
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
    assert set(arrays(updates)) == wanted
    assert np.isfinite(METHODS[name].penalty(grafted, second))


NODES = [("houlsby", "bert"), ("prompt", "gpt2"), ("prefix", "t5"), ("state", "mamba")]


@pytest.mark.parametrize(("name", "family"), NODES, ids=map("-".join, NODES))
def test_nodes_that_learned_are_not_written_over(name, family, rng_seed):
    method = method_of(name)
    before = taught(SETTINGS[name], base_of(family, rng_seed), rng_seed)
    for tree in (before, method.fold(before)):
        with pytest.raises(ConfigError, match="the base holds one already, "):
            method.graft(tree, jax.random.key(0), SETTINGS[name])


def restarted(base, seed):
    """A ReLoRA tree after a restart: its base has taken a pair in."""
    first, config = taught(configs.ReLoRAConfig(2), base, seed), configs.ReLoRAConfig(2)
    return taught(config, peft.merge(first), seed + 1)


def second_task(base, seed):
    return taught(configs.OLoRAConfig(2), taught(configs.LoRAConfig(3, targets="query|mlp/up"), base, seed), seed + 1)


TUNED = {
    "relora": ("llama", restarted),
    "olora": ("llama", second_task),
    "ia3": ("gpt2", lambda base, seed: taught(configs.IA3Config(), base, seed)),  # stretches biases as well
    "last": ("bart", lambda base, seed: taught(configs.SelectionConfig(last=1), base, seed)),
    "dora": ("llama", lambda base, seed: taught(configs.DoRAConfig(2), base, seed)),
}


@pytest.mark.parametrize("name", TUNED)
def test_a_task_vector_is_all_that_was_learned(name, rng_seed):
    family, make = TUNED[name]
    base = base_of(family, rng_seed)
    tuned, batch = make(base, rng_seed), texts(family, rng_seed)
    vector = compose.difference(tuned, base)
    read = jax.jit(lambda params: logits(family, "lora", params, batch))
    wanted = read(unsplit(peft.merge(tuned)))
    assert apart([read(compose.apply(base, vector))], [wanted]) <= 1e-5
    assert apart([read(base)], [wanted]) > 1e-3
    some = dict(list(vector.items())[:-1])
    assert apart([read(compose.apply(base, some))], [wanted]) > 1e-4, "and no entry of it is for nothing"


def test_a_vector_of_nothing_counts_as_zeros(rng_seed):
    base = base_of("llama", rng_seed)
    vector = compose.difference(taught(configs.LoRAConfig(2), base, rng_seed), base)
    assert compose.difference(base, base) == {}
    both = compose.ties([vector, {}], density=1.0)
    jax.tree.map(np.testing.assert_array_equal, both, compose.ties([vector], density=1.0))


def test_the_last_layers_may_lie_in_several_runs(rng_seed):
    config = bert.bert(4, 12, 3, 31, 24).with_compute(Compute(layers="scan", kernels="plain"))
    base = random_weights(models.build(config), jax.random.key(rng_seed), jnp.zeros((1, 2), jnp.int32))
    key = jax.random.key(0)
    one = METHODS["selection"].graft(base, key, configs.SelectionConfig(last=1))
    settings = configs.SelectionConfig(last=3)
    three = METHODS["selection"].graft(one, key, settings)
    trainable, _ = partition(three, METHODS["selection"].trainable(three, settings))
    assert {path.split("/")[0] for path in arrays(trainable)} == {"layers_1", "layers_2"}
    jax.tree.map(np.testing.assert_array_equal, unsplit(three), base)
    other = split(base, 2)
    other["layers_1"] = peft.lora({"layers": other["layers_1"]}, key, rank=2)["layers"]
    assert "layers_0" in unsplit(other), "runs of different structure stay apart"


def test_shared_layers_are_rounded_as_others(rng_seed):
    config = bert.albert(3, 12, 3, 31, 8).with_compute(Compute(layers="scan", kernels="plain"))
    module, key = models.build(config), jax.random.key(rng_seed)
    base = random_weights(module, key, jnp.zeros((1, 2), jnp.int32))
    settings = configs.QLoRAConfig(2, kind="fp4", statistics="single", block=4)
    read = jax.jit(lambda params: module.apply({"params": params}, jnp.arange(7)[None]).logits)
    rounded = peft.merge(METHODS["qlora"].graft(base, key, settings))
    assert apart([read(METHODS["qlora"].graft(base, key, settings))], [read(rounded)]) <= 1e-5


def test_factors_do_not_decay_and_settings_that_choose_nothing_are_named(rng_seed):
    paths = {"layers/mlp/up/kernel/stretch", "layers/mlp/up/kernel/magnitude", "layers/mixer/start"}
    assert not any(map(decays, paths)) and decays("layers/mlp/up/kernel/a")
    with pytest.raises(ConfigError, match=r"targets: 'lyers' is not possible; it must find some of "):
        METHODS["child"].graft(
            base_of("llama", rng_seed), jax.random.key(0), configs.ChildConfig(mask="fisher", targets="lyers")
        )
    with pytest.raises(ConfigError, match=r"method.settle: 0.49 is not possible; of 3 steps none"):
        adalora.schedule(replace(configs.AdaLoRAConfig(), warmup=0.5, settle=0.49), 3, 9, 6)


def test_a_base_in_bfloat16_keeps_its_adapter_and_its_logits_apart(rng_seed, tmp_path):
    half = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    base = jax.tree.map(half, base_of("llama", rng_seed))
    config = configs.LoRAConfig(2, targets="^head/|query")
    learned = taught(config, base, rng_seed)
    save_adapter(tmp_path, config, learned, fingerprint(base))
    _, read = load_adapter(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, read, learned)
    with pytest.raises(ConfigError, match="its base has hash"):
        load_adapter(tmp_path, jax.tree.map(lambda x: x.astype(jnp.float32), base))
    narrow = Compute(layers="scan", kernels="plain", dtype="bfloat16", param_dtype="bfloat16")
    module = models.build(FAMILIES["llama"].with_compute(narrow))
    tokens = jnp.arange(9)[None]
    plain, fresh = (
        np.asarray(module.apply({"params": params}, tokens).logits)
        for params in (base, METHODS["lora"].graft(base, jax.random.key(0), config))
    )
    assert apart([fresh], [plain]) <= 1e-5, "a fresh pair on the head changes no sum in float32"
    assert np.mean(fresh == np.asarray(half(fresh), np.float32)) < 0.1, "logits are not rounded to bfloat16"
