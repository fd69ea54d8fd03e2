"""QLoRA end to end: what is rounded, what learns, what is kept where, and what a merge is worth."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import FAMILIES, VOCAB, base_of, logits, module_of, moved, texts
from operations import apart

from xylem import peft
from xylem.errors import ConfigError
from xylem.models.conversion import flatten
from xylem.models.leaves import LowRank, Quantized, is_leaf, materialize, plain
from xylem.models.llama import llama
from xylem.models.quantized import Quantized4
from xylem.models.settings import Compute
from xylem.peft.config import QLoRAConfig
from xylem.peft.merging import merge_error
from xylem.peft.methods import qlora
from xylem.peft.tree import combine, partition
from xylem.sharding import make_mesh
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm
from xylem.training.paging import HOST, paged, paged_step
from xylem.training.state import abstract_state, make_state, new_state
from xylem.training.step import train_step

# A table among the targets learns, but is not rounded.
CONFIG = QLoRAConfig(rank=3, alpha=5.0, block=8, group=32, targets=r"embed/|layers/.*/kernel")
forward = jax.jit(partial(logits, "llama", "qlora"))


@pytest.fixture
def case(rng_seed):
    base = base_of("llama", rng_seed)
    grafted = qlora.graft(base, jax.random.key(rng_seed), CONFIG)
    return base, grafted, moved(grafted, qlora.trainable(grafted, CONFIG), jax.random.key(rng_seed + 1))


def on_dense(params):
    """The same adapters on the decoded base."""
    twin = lambda w: LowRank(plain(w.base), w.a, w.b, w.scale) if is_leaf(w) else w  # noqa: E731
    return jax.tree.map(twin, params, is_leaf=is_leaf)


def in_layers(case):
    """The moved network without a pair beside its table, whose rows this mesh does not divide."""
    base, _, away = case
    return {**away, "embed": base["embed"]}


def batch_of(seed: int, rows: int = 8):
    text = np.random.default_rng(seed).integers(0, VOCAB, (rows, 10)).astype(np.int32)
    weights = np.ones((rows, 9), np.float32)
    return jax.tree.map(jnp.asarray, {"tokens": text[:, :-1], "labels": text[:, 1:], "weights": weights})


def test_kernels_in_layers_are_rounded_and_the_rest_is_as_it_was(case):
    base, grafted, _ = case
    for path, weight in flatten(grafted).items():
        below = weight.base if is_leaf(weight) else weight
        assert isinstance(below, Quantized4) == (path.startswith("layers/") and path.endswith("/kernel")), path
        if not isinstance(below, Quantized4):
            np.testing.assert_array_equal(below, flatten(base)[path])
    eight = qlora.graft(base, jax.random.key(0), QLoRAConfig(kind="int8", targets="mlp/up"))
    assert isinstance(eight["layers"]["mlp"]["up"]["kernel"].base, Quantized)


def test_gradients_are_those_of_the_decoded_base(case, rng_seed, proof):
    base, _, away = case
    batch = batch_of(rng_seed)

    @jax.jit
    def slope(params):
        trainable, frozen = partition(params, qlora.trainable(params, CONFIG))
        loss = lambda some: causal_lm(module_of("llama"), ObjectiveConfig(), combine(some, frozen), batch).loss  # noqa: E731
        return jax.tree.leaves(jax.grad(loss)(trainable))

    reference = slope(on_dense(away))
    undecoded = jax.tree.map(lambda x, w: x.replace(base=w) if is_leaf(x) else x, away, base, is_leaf=is_leaf)
    assert apart(slope(undecoded), reference, floor=1e-3) > 1e-3
    error = apart(slope(away), reference, floor=1e-3)
    fault = "the base before it was rounded"
    proof("QLoRA (llama): adapters' gradients", "LoRA on the decoded base", error, 1e-5, rng_seed, fault)


def test_a_step_moves_adapters_alone_and_they_alone_have_moments(case, rng_seed):
    _, grafted, _ = case
    optimizer = optax.adam(3e-2)
    state = new_state(grafted, optimizer, 0, trains=qlora.trainable(grafted, CONFIG))
    learned = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert sum(x.size for x in jax.tree.leaves(state.optimizer)) == 2 * learned + 1
    names = {path.rsplit("/", 1)[-1] for path in flatten_paths(state.trainable)}
    assert names == {"a", "b"}
    loss = partial(causal_lm, module_of("llama"), ObjectiveConfig())
    step, losses = jax.jit(partial(train_step, loss=loss, optimizer=optimizer)), []
    before = state
    for _ in range(6):
        state, metrics = step(state, batch_of(rng_seed))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)


def flatten_paths(tree):
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_merging_is_onto_the_decoded_base_and_nothing_is_rounded_twice(case, rng_seed):
    base, _, away = case
    compute = partial(forward, batch=texts("llama", rng_seed))
    error = merge_error(compute, away)
    merged = peft.merge(away)
    again = materialize(qlora.graft(merged, jax.random.key(0), CONFIG))
    lost = apart([compute(again)], [compute(away)])
    onto_original = jax.tree.map(lambda w, d: d + w._delta() if is_leaf(w) else w, away, base, is_leaf=is_leaf)
    wrong = apart([compute(onto_original)], [compute(away)])
    print(f"merged onto the decoded base {error:.2g}, onto the original {wrong:.2g}, rounded again {lost:.2g}")
    assert error <= 1e-5 and min(lost, wrong) > 1e-3
    with pytest.raises(ValueError, match="not rounded again"):
        peft.unmerge(merged, away)
    with pytest.raises(ConfigError, match="grafted or quantized already"):
        peft.qlora(away, jax.random.key(0))


def test_in_bfloat16_a_merge_has_a_price_that_is_measured(case, rng_seed):
    half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x  # noqa: E731
    base = jax.tree.map(half, case[0])
    grafted = qlora.graft(base, jax.random.key(1), CONFIG)
    away = moved(grafted, qlora.trainable(grafted, CONFIG), jax.random.key(2))
    assert 1e-5 < merge_error(partial(forward, batch=texts("llama", rng_seed)), away) < 0.1


@pytest.mark.parametrize("fields", [{"block": 7}, {"group": 0}])
def test_bad_settings_are_named(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        QLoRAConfig(**fields)


def test_a_parameter_of_the_base_takes_half_a_byte():
    """TinyLlama's matrices: 4 bits, 8 for each 64 and 32 for each 16,384 (2305.14314, section 3)."""
    config = llama(2, 2048, 32, 4, 5632, 320, 128, rope_theta=1e4, norm_eps=1e-5, head="untied")

    def grafted():
        params: Any = (
            module_of("llama").clone(config=config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        )
        return qlora.graft(params, jax.random.key(1), QLoRAConfig())

    leaves = [w.base for w in flatten(jax.eval_shape(grafted)).values() if is_leaf(w)]
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaves))
    per_weight = held / sum(int(np.prod(leaf.shape)) for leaf in leaves)
    assert 0.515 < per_weight <= 0.52
    assert per_weight == pytest.approx(1 / 2 + 1 / 64 + 4 / (64 * 256), rel=1e-4)


def test_eight_devices_compute_what_one_does_and_hold_a_part(case, rng_seed):
    away = in_layers(case)
    mesh, batch = make_mesh(2, 2, 2), texts("llama", rng_seed)
    create = lambda: new_state(away, optax.sgd(0.1), 0, trains=qlora.trainable(away, CONFIG))  # noqa: E731
    state = make_state(create, abstract_state(create, mesh))
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    layers, rows, columns = kernel.base.codes.shape
    assert kernel.base.codes.addressable_shards[0].data.shape == (layers, rows // 2, columns // 2)
    assert kernel.base.scales.addressable_shards[0].data.shape == (*kernel.base.scales.shape[:2], columns // 2)
    with jax.set_mesh(mesh):
        spread = forward(state.params, batch=batch)
    assert apart([spread], [forward(away, batch=batch)]) <= 1e-5


def test_paged_moments_lie_on_the_host_and_move_as_others_do(case, rng_seed):
    grafted = in_layers(case)
    mesh, optimizer = make_mesh(1, 2, 1), optax.adam(1e-2)
    create = lambda: new_state(grafted, optimizer, 0, trains=qlora.trainable(grafted, CONFIG))  # noqa: E731
    abstract = abstract_state(create, mesh)
    usual = jax.tree.map(lambda x: x.sharding, abstract)
    host = usual.replace(optimizer=paged(usual.optimizer, abstract.optimizer))
    loss = partial(causal_lm, module_of("llama"), ObjectiveConfig())
    step = partial(train_step, loss=loss, optimizer=optimizer)
    ends = {}
    for name, where, each in (("usual", usual, step), ("paged", host, paged_step(step))):
        state = jax.device_put(make_state(create, abstract), where)
        stepped = jax.jit(each, donate_argnums=0, out_shardings=(where, None))
        with jax.set_mesh(mesh):
            for index in range(3):
                state, _ = stepped(state, batch_of(rng_seed + index))
        ends[name] = state
    kinds = [{x.sharding.memory_kind for x in jax.tree.leaves(ends[name].optimizer) if x.ndim} for name in ends]
    assert kinds == [{"device"}, {HOST}]
    assert {x.sharding.memory_kind for x in jax.tree.leaves(ends["paged"].trainable)} == {"device"}
    assert apart(*(jax.tree.map(np.asarray, end.trainable) for end in ends.values())) <= 1e-6, "two programs"
    assert apart(*(jax.tree.map(np.asarray, end.optimizer) for end in ends.values()), floor=1e-3) <= 1e-5


def test_recomputed_layers_give_the_same_gradient(case, rng_seed):
    """Under remat, layer by layer: what is decoded twice is the same."""
    _, _, away = case
    batch, found = batch_of(rng_seed), []
    trainable, frozen = partition(away, qlora.trainable(away, CONFIG))
    for remat in ("none", "full"):
        compute = Compute(layers="scan", kernels="plain", remat=remat)
        module = module_of("llama").clone(config=FAMILIES["llama"].with_compute(compute))
        loss = lambda some, m=module: causal_lm(m, ObjectiveConfig(), combine(some, frozen), batch).loss  # noqa: E731
        found.append(jax.tree.leaves(jax.jit(jax.grad(loss))(trainable)))
    assert apart(*found, floor=1e-3) <= 1e-5
