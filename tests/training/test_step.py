"""One step: accumulation, randomness, what is skipped, what is averaged, what stays."""

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import BAR, apart

from xylem import models
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.models.settings import Compute
from xylem.peft import tree
from xylem.sharding import batch_sharding, make_mesh, path_name
from xylem.training.config import OptimizerConfig
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm
from xylem.training.optimizers import make_optimizer
from xylem.training.state import abstract_state, everything, make_state, new_state
from xylem.training.step import eval_step, gradients, train_step

ROWS, T, V = 8, 11, 34
PLAIN = Compute(layers="scan", kernels="plain")
FLOOR = 1e-3  # a key's bias shifts every score alike: its gradient is rounding
CONFIGS = {
    "gpt": replace(gpt(2, 12, 4, V, 18), compute=PLAIN),
    "llama": replace(llama(2, 16, 4, 2, 22, V, 18, rope_theta=777.0, norm_eps=1e-4), compute=PLAIN),
}
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.02, schedule="constant", warmup_steps=0), 100)


def mlp_only(path, weight) -> bool:
    return "/mlp/" in path


@functools.cache
def programs(config, accumulate: int = 1, ema: float | None = None, trains=everything):
    """(module, create, step) of a config; the step is jitted once."""
    module = models.build(config)
    loss = partial(causal_lm, module, ObjectiveConfig(label_smoothing=0.1))

    def create():
        params = module.init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"]
        return new_state(params, OPTIMIZER, 5, ema, trains)

    step = partial(train_step, loss=loss, optimizer=OPTIMIZER, accumulate=accumulate, ema=ema)
    return loss, jax.jit(create), jax.jit(step)


@functools.cache
def gradient(config, accumulate: int):
    """Jitted gradients and sums of a config, compiled once."""
    loss = programs(config)[0]
    return jax.jit(lambda state, batch: gradients(loss, state, batch, accumulate, jax.random.key(0)))


def random_batch(rng: np.random.Generator) -> dict:
    """Rows of very uneven weight: row 0 has two labels, row 1 none, the others between a few and all."""
    counts = np.array([2, 0, T, 5, T, 3, 7, T])
    weights = (np.arange(T)[None] < counts[:, None]).astype(np.float32)
    tokens = rng.integers(0, V, (ROWS, T + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segments": np.ones((ROWS, T), np.int32),
        "weights": weights,
    }


def same_bits(one, other) -> bool:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture
def batch(rng_seed):
    return random_batch(np.random.default_rng(rng_seed))


@pytest.mark.parametrize(("family", "count"), [("gpt", 2), ("llama", 2), ("llama", 4)])
def test_accumulation_equals_the_whole_batch(family, count, batch, rng_seed, proof):
    state = programs(CONFIGS[family])[1]()
    whole = gradient(CONFIGS[family], 1)(state, batch)
    cut = gradient(CONFIGS[family], count)(state, batch)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(cut))
    # The usual fault: the mean of the micro-batches' own means.
    only = lambda part: np.where(np.arange(ROWS)[:, None] % count == part, batch["weights"], 0)  # noqa: E731
    each = [gradient(CONFIGS[family], 1)(state, batch | {"weights": only(part)})[0] for part in range(count)]
    assert apart(jax.tree.map(lambda *grads: sum(grads) / count, *each), whole[0], FLOOR) > 1e-2
    row = f"{family} gradient of {count} accumulated micro-batches, uneven weights"
    assert apart(cut[1], whole[1]) <= 1e-6
    error = apart(cut[0], whole[0], FLOOR)
    proof(row, "the undivided batch", error, BAR, rng_seed, "mean of the micro-batches' means")


@pytest.mark.parametrize("taken", [1, 3])
def test_a_batch_that_still_grows_has_the_gradient_of_its_own_rows(taken, rng_seed, proof):
    """The first ``taken`` of 4 micro-batches of 2 rows, against the plain step of 2 x taken rows."""
    rng, full = np.random.default_rng(rng_seed), 4
    rows = {name: x[: 2 * taken] for name, x in random_batch(rng).items()}
    calls, loss, state = [], programs(CONFIGS["gpt"])[0], programs(CONFIGS["gpt"])[1]()

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return loss(*args)

    grown = jax.jit(lambda batch: gradients(counted, state, batch, full, jax.random.key(0)))
    padded = {name: np.zeros((2, full, *x.shape[1:]), x.dtype) for name, x in rows.items()}
    for name, x in rows.items():
        padded[name][:, :taken] = x.reshape(2, taken, *x.shape[1:])
    batch = {name: x.reshape(2 * full, *x.shape[2:]) for name, x in padded.items()}
    ours, expected = grown(batch), gradient(CONFIGS["gpt"], 1)(state, rows)
    jax.effects_barrier()
    assert len(calls) == taken, "nothing is computed behind them"
    assert apart(ours[1], expected[1]) <= 1e-6
    counting = grown(batch | {"weights": np.where(np.arange(8)[:, None] % full < taken, batch["weights"], 1.0)})
    assert apart(counting[0], expected[0], FLOOR) > 1e-2
    name = f"batch ramp: gradient of {taken} of {full} micro-batches"
    proof(name, "the plain step of that batch", apart(ours[0], expected[0], FLOOR), BAR, rng_seed, "padding counted")


def test_dropout_is_the_same_under_remat_and_under_sharding(batch):
    config = replace(CONFIGS["gpt"], dropout=0.3)
    create = programs(CONFIGS["gpt"])[1]
    found, _ = gradient(config, 1)(create(), batch)
    assert apart(found, gradient(CONFIGS["gpt"], 1)(create(), batch)[0], FLOOR) > 1e-2, "dropout must do something"
    recomputed, _ = gradient(replace(config, compute=replace(PLAIN, remat="full")), 1)(create(), batch)
    assert apart(recomputed, found, FLOOR) <= 1e-5
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        sharded = make_state(create, abstract_state(create, mesh))
        on_mesh = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch)
        spread, _ = gradient(config, 1)(sharded, on_mesh)
    assert apart(spread, found, FLOOR) <= 1e-5


def test_dropout_draws_anew_each_step(batch):
    _, create, step = programs(replace(CONFIGS["gpt"], dropout=0.3))
    state = create()
    _, first = step(state, batch)
    _, second = step(state.replace(step=state.step + 1), batch)
    # One of them may well round to the same number, both will not.
    assert any(float(first[name]) != float(second[name]) for name in ("loss", "gradient_norm"))


def test_non_finite_gradient_changes_nothing_and_is_counted(batch):
    _, create, step = programs(CONFIGS["llama"], ema=0.9)
    state, _ = step(create(), batch)
    weights = batch["weights"].copy()
    weights[2, 3] = np.inf
    for count in (1, 2):
        before = state
        state, out = step(before, batch | {"weights": weights})
        assert not np.isfinite(float(out["gradient_norm"]))
        assert int(out["nonfinite"]) == int(state.nonfinite) == count
        assert int(state.step) == 1 + count
        for part in ("trainable", "frozen", "optimizer", "ema", "rng"):
            assert same_bits(getattr(state, part), getattr(before, part)), part
    state, out = step(state, batch)
    assert int(state.nonfinite) == int(out["nonfinite"]) == 0
    assert not same_bits(state.trainable, before.trainable)


def test_average_follows_its_formula(batch):
    _, create, step = programs(CONFIGS["llama"], ema=0.9)
    state = create()
    assert same_bits(state.ema, state.trainable)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.ema)
    for _ in range(3):
        state, _ = step(state, batch)
        expected = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * np.asarray(p, np.float64), expected, state.trainable)
    assert apart(state.ema, expected, FLOOR) <= 1e-6
    assert same_bits(state.averaged, state.ema)
    assert apart(state.ema, state.trainable, FLOOR) > 1e-3


def test_frozen_weights_never_move_and_have_no_optimizer_state(batch):
    _, create, step = programs(CONFIGS["gpt"], ema=0.5, trains=mlp_only)
    state = create()
    held = {path_name(path) for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer) if x.ndim > 1}
    assert held and all("/mlp/" in path for path in held)
    assert all("/mlp/" in path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.ema))
    after = state
    for _ in range(2):
        after, _ = step(after, batch)
    assert same_bits(after.frozen, state.frozen)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), after.trainable, state.trainable)
    assert all(jax.tree.leaves(moved))
    assert jax.tree.structure(after.params) == jax.tree.structure(state.params)
    assert tree.count(after.averaged) == tree.count(after.params)


def test_the_same_step_twice_gives_the_same_bits(batch):
    _, create, step = programs(replace(CONFIGS["gpt"], dropout=0.3))
    state = create()
    assert same_bits(step(state, batch), step(state, batch))
    assert same_bits(create(), state)


def test_bfloat16_compute_trains_float32_masters(batch):
    config = replace(CONFIGS["llama"], compute=replace(PLAIN, dtype="bfloat16"))
    loss, create, step = programs(config)
    state = create()
    assert {str(x.dtype) for x in jax.tree.leaves((state.params, state.optimizer))} == {"float32", "int32"}
    products = [line for line in step.lower(state, batch).as_text().splitlines() if "dot_general" in line]
    assert sum("bf16" in line for line in products) > len(products) / 2
    wide = programs(CONFIGS["llama"])[2](create(), batch)[1]["loss"]
    losses = []
    for _ in range(30):
        state, out = step(state, batch)
        losses.append(float(out["loss"]))
    np.testing.assert_allclose(losses[0], wide, rtol=2e-2)
    assert losses[-1] < 0.6 * losses[0]
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
    sums = jax.jit(partial(eval_step, loss=loss))(state.params, batch)
    assert sums.loss.dtype == jnp.float32 and float(sums.nll) / float(sums.weight) < losses[0]
