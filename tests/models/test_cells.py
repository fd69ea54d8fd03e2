"""Cells and their layers: the hand-written derivative as the plain one, and how far a gradient reaches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart, normal, with_gradients

from xylem.models import cells

CELL = pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])


def weights_of(cell, rng, inputs, width):
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[cell] * width
    kernel = lambda rows: normal(rng, rows, gates, std=0.7 * rows**-0.5)  # noqa: E731
    bias = lambda: normal(rng, gates, std=0.3)  # noqa: E731
    return {
        "input": {"kernel": kernel(inputs), "bias": bias()},
        "recurrent": {"kernel": kernel(width), "bias": bias()},
    }


# --- the derivative ---------------------------------------------------------------------------------------------------


def steps_case(cell, rng):
    """Arguments of ``cells.steps``: a batch of 3, 9 steps, width 5, documents and padding marked."""
    width, weights = 5, weights_of(cell, rng, 5, 5)["recurrent"]
    x = normal(rng, 9, 3, weights["bias"].shape[0])
    state = {name: normal(rng, 3, width, std=0.5) for name in cells.CELLS[cell].state}
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0, 0], [4] * 9, [0, 0, 7, 7, 0, 0, 3, 3, 3]])
    return (x, weights["kernel"], weights["bias"], state), cells.marks(segments)


@CELL
@pytest.mark.parametrize("marked", [False, True])
def test_recurrent_derivative_equals_the_plain_one(cell, marked, rng_seed):
    args, where = steps_case(cell, np.random.default_rng(rng_seed))
    where = where if marked else None
    ours, plain = (
        with_gradients(jax.jit(lambda *a, f=f: f(cell, *a, where)), args, rng_seed)
        for f in (cells.steps, cells.steps_plain)
    )
    assert apart(ours, plain) <= 1e-5


@pytest.mark.parametrize("cell", ["lstm"])  # its state has two parts
def test_recurrent_derivative_survives_transformations(cell, rng_seed):
    args, where = steps_case(cell, np.random.default_rng(rng_seed))
    doubled = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), args)

    def scanned(function):
        def body(carry, each):
            out = jax.checkpoint(function)(*each)
            return carry + sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(out)), None

        return lambda *a: jax.lax.scan(body, jnp.zeros(()), a)[0]

    for transform in (scanned, jax.vmap):
        run = lambda f, transform=transform: jax.jit(transform(lambda *a: f(cell, *a, where)))  # noqa: E731
        ours, plain = (with_gradients(run(f), doubled, rng_seed) for f in (cells.steps, cells.steps_plain))
        assert apart(ours, plain) <= 1e-5


@CELL
def test_recurrent_layer_in_bfloat16_stays_near_float32_and_sums_its_cell_in_float32(cell, rng_seed):
    rng = np.random.default_rng(rng_seed)
    weights, x = weights_of(cell, rng, 7, 9), normal(rng, 2, 11, 7)

    def run(dtype):
        state = cells.zero_state(cell, 2, 9, dtype)
        return jax.jit(partial(cells.layer, cell))(weights, x.astype(dtype), state)

    (out, states), (wide, _) = run("bfloat16"), run("float32")
    assert out.dtype == jnp.bfloat16 and {x.dtype.name for name, x in states.items() if name == "cell"} <= {"float32"}
    assert 0.0 < apart(out, wide) <= 0.05


# --- what is left of a gradient ---------------------------------------------------------------------------------------


def test_gradient_flow_vanishes_in_an_rnn_long_before_an_lstm_with_open_forget_gates(rng_seed):
    width, rng = 24, np.random.default_rng(rng_seed)
    x = normal(rng, 4, 201, width)
    flow = {cell: jax.jit(partial(cells.gradient_flow, cell)) for cell in ("rnn", "lstm")}

    def at_200(cell, forget_bias=0.0):
        weights = weights_of(cell, rng, width, width)
        if cell == "lstm":
            weights["input"]["bias"] = jnp.repeat(jnp.array([0.0, forget_bias, 0.0, 0.0]), width)
        found = flow[cell](weights, x)
        assert not np.any(found[:, 0]) and bool(jnp.isfinite(found).all())
        return found[:, 200]

    simple, closed, opened, wide_open = at_200("rnn"), at_200("lstm"), at_200("lstm", 1.0), at_200("lstm", 6.0)
    assert float(simple.max()) < float(opened.min()) - 5
    assert float(closed.max()) < float(opened.min()) - 5
    assert float(opened.max()) < float(wide_open.min()) - 5
