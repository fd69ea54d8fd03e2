"""Where each array of a training state lies, and that every sharding rule and every weight of every preset meet."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from xylem import models, peft, sharding
from xylem.models import heads
from xylem.models.leaves import LowRank, Quantized
from xylem.models.llama import llama
from xylem.models.rnn import lstm
from xylem.models.settings import Compute
from xylem.models.state_config import WindowedConfig
from xylem.peft import tree
from xylem.sharding import make_mesh, param_specs, path_name, shardings, spec_for
from xylem.training.config import OptimizerConfig
from xylem.training.optimizers import make_optimizer
from xylem.training.state import abstract_state, make_state, new_state

# Both sides of some kernels are 128 and more: there Adafactor factors.
WIDE = replace(llama(3, 136, 4, 2, 152, 138, 18, rope_theta=777.0, norm_eps=1e-4), compute=Compute(kernels="plain"))


@cache
def shapes(preset: str):
    module = models.build(models.PRESETS[preset]())
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def flat(whole) -> dict:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(whole)}


def with_adapters(params: dict) -> dict:
    """The abstract tree with every optional slot of every layer, on both sides where there are two."""
    if "layers" not in params:
        return {**params, **{side: with_adapters(params[side]) for side in ("encoder", "decoder")}}
    parts = [part for part in ("attention", "mlp", "mixer") if f"{part}_norm" in params["layers"]]
    layers, width = params["layers"][f"{parts[0]}_norm"]["scale"].shape
    array = lambda *shape: jax.ShapeDtypeStruct((layers, *shape), jnp.float32)  # noqa: E731
    slot = {
        "down": {"kernel": array(width, 8), "bias": array(8)},
        "up": {"kernel": array(8, width), "bias": array(width)},
    }
    return {**params, "layers": {**params["layers"], **{f"{part}_adapter": slot for part in parts}}}


def with_fresh_heads(preset: str) -> dict:
    """A preset's abstract tree with a classifier and a tagger beside it."""
    config, key = models.PRESETS[preset](), jax.random.key(0)
    made = lambda kind: jax.eval_shape(lambda p: heads.add(config, p, key, 3, kind), shapes(preset))  # noqa: E731
    return {**made("tagger"), **made("classifier")}


@pytest.mark.parametrize("preset", ["bert_base", "roberta_base", "albert_base"])
def test_every_weight_of_a_head_matches_one_rule_and_is_divided(preset):
    placed = flat(shardings(with_fresh_heads(preset), make_mesh(1, 4, 2)))  # refuses what the mesh does not divide
    assert placed["classifier/kernel"].spec == placed["tagger/kernel"].spec == P("fsdp", None)


def test_a_mesh_of_four_divides_the_head_of_pairs():
    assert flat(shardings(shapes("bert_base"), make_mesh(1, 4, 2)))["pair_head/kernel"].spec == P("fsdp", None)


@pytest.mark.parametrize("preset", sorted(models.PRESETS))
def test_every_weight_of_every_preset_matches_exactly_one_rule(preset):
    params = with_adapters(shapes(preset))
    for name, weight in flat(params).items():
        matching = [rule for rule, _ in sharding.RULES if re.fullmatch(rule, name)]
        assert len(matching) == 1, (name, matching)
        assert len(spec_for(name, len(weight.shape))) in (0, len(weight.shape))
    assert flat(param_specs(params)).keys() == flat(params).keys()


def test_every_rule_is_used_by_some_preset():
    names = {name for preset in models.PRESETS for name in flat(with_adapters(shapes(preset)))}
    for config in (lstm(2, 8, 9, 7), WindowedConfig("textgenrnn", 9, 7, 3, 2, 5, 8)):  # of which none was published
        made = jax.eval_shape(models.build(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        names |= set(flat(made["params"]))
    names |= {name for preset in ("bert_base", "roberta_base") for name in flat(with_fresh_heads(preset))}
    grafts = [("llama3_2_1b", "bitfit", {"missing": "add"}), ("mamba_130m", "bitfit", {"missing": "add"})]
    grafts += [("t5_small", "prefix", {"hidden": hidden}) for hidden in (0, 8)] + [("gpt2", "prompt", {})]
    grafts += [("mamba_130m", "state", {})]
    for preset, method, values in grafts:
        graft = partial(getattr(peft, method), **values)
        names |= set(flat(jax.eval_shape(graft, shapes(preset), jax.random.key(0))))
    unused = [rule for rule, _ in sharding.RULES if not any(re.fullmatch(rule, name) for name in names)]
    assert not unused


def test_a_split_stack_is_sharded_as_the_whole_one():
    whole = flat(param_specs(shapes("llama3_2_1b")))
    runs = flat(param_specs(jax.eval_shape(lambda p: tree.split(p, 7), shapes("llama3_2_1b"))))
    assert {re.sub(r"layers_[01]", "layers", name): spec for name, spec in runs.items()} == whole


def test_a_weight_without_a_rule_or_with_two_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="layers/attention/rotate/kernel: 0 sharding rules match"):
        spec_for("layers/attention/rotate/kernel", 3)
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, (r"head/.*", P())))
    with pytest.raises(ValueError, match="head/kernel: 2 sharding rules match"):
        spec_for("head/kernel", 2)


def state_of(name: str, params):
    optimizer = make_optimizer(OptimizerConfig(name=name), 10)
    mesh = make_mesh(2, 2, 2)
    return abstract_state(lambda: new_state(params(), optimizer, 0, ema=0.9), mesh), mesh


def wide_params():
    return models.build(WIDE).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_optimizer_state_lies_as_its_weights(name):
    state, mesh = state_of(name, wide_params)
    where = flat(shardings(state.params, mesh))
    weights, moments = flat(state.params), flat(state.optimizer)
    as_weight, replicated = set(), set()
    for path, array in moments.items():
        owner = next((w for w in weights if path.endswith(f"/{w}")), None)
        if owner is not None and array.shape == weights[owner].shape:
            assert array.sharding == where[owner], path
            as_weight.add(owner)
        else:
            assert array.sharding.is_fully_replicated, path
            replicated.add(path)
    if name == "adafactor":
        factored = {w for w in weights if w not in as_weight}
        sides = {min(weights[w].shape[-2:]) for w in factored}
        assert factored and min(sides) >= 128, "only what is factored may lack an array of its weight's shape"
        rows = [moments[path] for path in replicated if "v_row/layers/mlp/up/kernel" in path]
        assert [row.shape for row in rows] == [(3, 136)]
    else:
        assert as_weight == set(weights)
        big = [moments[path] for path in replicated if moments[path].size > 3 * 3]
        assert not big, "only counts and constants are replicated"
    assert {path: x.sharding for path, x in flat(state.ema).items()} == where


def test_state_is_born_sharded():
    state, _ = state_of("adamw", wide_params)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    made = make_state(lambda: new_state(wide_params(), optimizer, 0, ema=0.9), state)
    for path, array in flat(made).items():
        expected = flat(state)[path]
        assert array.sharding == expected.sharding and array.shape == expected.shape, path
    kernel = made.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 136 // 2, 152 // 2)
    assert made.params["embed"]["embedding"].addressable_shards[0].data.shape == (138 // 2, 136 // 2)


def test_a_leaf_and_its_optimizer_state_lie_as_the_leaf_says():
    def grafted():
        params = wide_params()
        base = params["layers"]["mlp"]["up"]["kernel"]
        a, b = jnp.zeros((3, 136, 4)), jnp.zeros((3, 4, 152))
        up = {"kernel": LowRank(Quantized.quantize(base), a, b, jnp.ones(3))}
        return {**params, "layers": {**params["layers"], "mlp": {**params["layers"]["mlp"], "up": up}}}

    optimizer, mesh = make_optimizer(OptimizerConfig(), 10), make_mesh(2, 2, 2)
    low_rank = lambda path, _: path.endswith(("/a", "/b"))  # noqa: E731
    state = abstract_state(lambda: new_state(grafted(), optimizer, 0, trains=low_rank), mesh)
    found = {path: array.sharding.spec for path, array in flat(state).items()}
    kernel = "layers/mlp/up/kernel"
    assert found[f"trainable/{kernel}/a"] == P(None, "fsdp", None)
    assert found[f"trainable/{kernel}/b"] == P(None, None, "tensor")
    assert found[f"frozen/{kernel}/base/values"] == P(None, "fsdp", "tensor")
    assert found[f"frozen/{kernel}/base/scales"] == P(None, None, "tensor")
    moments = {path: spec for path, spec in found.items() if path.startswith("optimizer") and kernel in path}
    assert len(moments) == 4, moments
    assert all(spec == found[f"trainable/{kernel}/{path[-1]}"] for path, spec in moments.items())


def test_a_pair_beside_a_vocabulary_that_the_mesh_does_not_divide_stays_whole():
    params = jax.eval_shape(partial(peft.lora, targets="embed/"), shapes("gpt2"), jax.random.key(0))
    placed = shardings(params, make_mesh(data=2, fsdp=2, tensor=2))["embed"]["embedding"]
    assert (placed.a.spec, placed.b.spec) == (P(None, None), P(None, "fsdp"))
