"""Recurrent cells, and a layer of one over time.

A cell says what its gates make of two vectors: ``x``, what the input contributes to them, and ``u``, what the state
does. Only ``u`` has to wait for the step before, so a layer makes ``x`` of all steps in one matrix product, and the
scan over time holds one product a step. (Scanning two, four or eight steps at once was slower on CPU: 2%, 20%, 60% for
an LSTM of width 384.) The gates of one kernel stand side by side, in the order in which torch and cuDNN keep them.

The weights of a layer are ``{"input": {"kernel", "bias"}, "recurrent": {"kernel", "bias"}}``, its state a tree of
``hidden``, which is also its output, and for the LSTM ``cell``. Two biases are one too many but for the GRU, whose
reset gate stands between them; the field's libraries and their files have two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xylem.models.fused import Choice
from xylem.models.layers import add_bias, einsum
from xylem.models.leaves import Leaf
from xylem.sharding import constrain

F32 = jnp.float32
State = dict[str, Array]
Weights = Mapping[str, Mapping[str, Any]]


# --- what the gates do ------------------------------------------------------------------------------------------------


def rnn(x: Float[Array, "B E"], u: Float[Array, "B E"], state: State) -> State:
    """``tanh(x + u)`` (Elman 1990, "Finding Structure in Time")."""
    return {"hidden": jnp.tanh(x + u)}


def lstm(x: Float[Array, "B E"], u: Float[Array, "B E"], state: State) -> State:
    """Input, forget, candidate and output (Hochreiter & Schmidhuber 1997; the forget gate: Gers et al. 2000)."""
    enter, forget, candidate, output = jnp.split(x + u, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * state["cell"] + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
    return {"hidden": jax.nn.sigmoid(output) * jnp.tanh(cell), "cell": cell}


def gru(x: Float[Array, "B E"], u: Float[Array, "B E"], state: State) -> State:
    """Reset, update and candidate (1406.1078, section 2.3), the reset gate behind the state's product as in cuDNN."""
    (xr, xz, xn), (ur, uz, un) = jnp.split(x, 3, axis=-1), jnp.split(u, 3, axis=-1)
    update = jax.nn.sigmoid(xz + uz)
    candidate = jnp.tanh(xn + jax.nn.sigmoid(xr + ur) * un)
    return {"hidden": (1.0 - update) * candidate + update * state["hidden"]}


class Cell(NamedTuple):
    """What the gates do, and the names of the state. How many there are: ``config.CELL_GATES``."""

    function: Callable[[Array, Array, State], State]
    state: tuple[str, ...]


CELLS = {"rnn": Cell(rnn, ("hidden",)), "lstm": Cell(lstm, ("hidden", "cell")), "gru": Cell(gru, ("hidden",))}


def state_shapes(cell: str, width: int, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The state of one row. ``hidden`` has the compute type; ``cell``, a sum over all steps, is float32."""
    return {
        name: jax.ShapeDtypeStruct((width,), jnp.dtype(dtype) if name == "hidden" else F32)
        for name in CELLS[cell].state
    }


def zero_state(cell: str, batch: int, width: int, dtype: str = "float32") -> State:
    """The state before the first token."""
    shapes = state_shapes(cell, width, dtype)
    return {name: jnp.zeros((batch, *one.shape), one.dtype) for name, one in shapes.items()}


# --- over time --------------------------------------------------------------------------------------------------------


class Marks(NamedTuple):
    """Where a row begins a new document, from the zero state, and where it is padding, which leaves the state alone."""

    begins: Bool[Array, "*T B"]
    padding: Bool[Array, "*T B"]


def marks(segments: Int[Array, "B T"]) -> Marks:
    """What ``segments`` (0 is padding) say, time first. What a row begins with may continue a document."""
    segments = segments.T
    changes = jnp.concatenate([jnp.zeros_like(segments[:1], bool), segments[1:] != segments[:-1]])
    return Marks(begins=changes & (segments > 0), padding=segments == 0)


def layer(
    cell: str,
    weights: Weights,
    x: Float[Array, "B T I"],
    state: State,
    segments: Int[Array, "B T"] | None = None,
    kernels: Choice | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "T B D"]]]:
    """A recurrent layer: its outputs, and its state after every token, time first.

    ``segments`` keep packed documents apart: the state is zero where one begins, unless it begins the row, which goes
    on from ``state``. Padding (0) changes no state and repeats the output before it.
    """
    inputs, recurrent = weights["input"], weights["recurrent"]
    ahead = add_bias(einsum("...i,io->...o", x.swapaxes(0, 1), inputs["kernel"], kernels), inputs["bias"])
    kernel, bias = recurrent["kernel"], recurrent["bias"]
    where = None if segments is None else marks(segments)
    states: Any
    # Gathered here, once: left split over a mesh, it would be gathered in every step, and XLA's partitioner got the
    # gradients of such steps wrong where three mesh axes met (jax 0.10, by a tenth and more).
    kernel = kernel if isinstance(kernel, Leaf) else kernel.astype(x.dtype)
    kernel = jax.tree.map(lambda part: constrain(part, *[None] * part.ndim), kernel)
    if kernels is None or not kernels.matmul or isinstance(kernel, Leaf):
        states = steps_plain(cell, ahead, kernel, bias, state, where)
    else:
        states = steps(cell, ahead, kernel, bias.astype(x.dtype), state, where)
    return states["hidden"].swapaxes(0, 1), states


def _gates(cell: str, padding: Array | None, x: Array, u: Array, state: State) -> State:
    """The state after one token, by the cell in float32; padding leaves it as it was."""
    wide = jax.tree.map(lambda value: value.astype(F32), (x, u, state))
    new = CELLS[cell].function(*wide)
    new = {name: new[name].astype(value.dtype) for name, value in state.items()}
    return new if padding is None else _where(padding, state, new)


def _where(rows: Bool[Array, "*T B"], yes: Any, no: Any) -> Any:
    """``jnp.where`` by rows, over two trees; a ``yes`` of None is all zeros."""
    choose = lambda a, b: jnp.where(rows[..., None], a, b)  # noqa: E731
    return jax.tree.map(lambda b: choose(0.0, b), no) if yes is None else jax.tree.map(choose, yes, no)


def steps_plain(
    cell: str,
    x: Float[Array, "T B E"],
    kernel: Float[Array, "D E"] | Leaf,
    bias: Float[Array, "E"],
    state: State,
    where: Marks | None,
) -> dict[str, Float[Array, "T B D"]]:
    """The states after every step, from ``state`` on."""

    def step(state, inputs):
        x, here = inputs
        state = state if here is None else _where(here.begins, None, state)
        u = add_bias(einsum("...i,io->...o", state["hidden"], kernel), bias)
        state = _gates(cell, None if here is None else here.padding, x, u, state)
        return state, state

    return jax.lax.scan(step, state, (x, where))[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def steps(
    cell: str,
    x: Float[Array, "T B E"],
    kernel: Float[Array, "D E"],
    bias: Float[Array, "E"],
    state: State,
    where: Marks | None,
) -> dict[str, Float[Array, "T B D"]]:
    """``steps_plain``, whose gradient by the kernel is one product over all steps, not one and a sum for each."""
    return steps_plain(cell, x, kernel, bias, state, where)


def _steps_forward(cell, x, kernel, bias, state, where):
    def step(state, inputs):
        x, here = inputs
        state = state if here is None else _where(here.begins, None, state)
        u = add_bias(state["hidden"] @ kernel, bias)
        state = _gates(cell, None if here is None else here.padding, x, u, state)
        return state, (state, u)

    states, u = jax.lax.scan(step, state, (x, where))[1]
    return states, (x, u, kernel, bias, state, states, where)


def _steps_backward(cell, saved, dstates):
    x, u, kernel, bias, first, states, where = saved
    before = jax.tree.map(lambda one, all: jnp.concatenate([one[None], all[:-1]]), first, states)
    before = before if where is None else _where(where.begins, None, before)
    transposed = jax.lax.optimization_barrier(kernel.T)  # once, not in every step

    def step(dstate, inputs):
        x, u, before, here, dout = inputs
        _, pull = jax.vjp(partial(_gates, cell, None if here is None else here.padding), x, u, before)
        dx, du, dbefore = pull(jax.tree.map(jnp.add, dstate, dout))
        dbefore["hidden"] += du @ transposed
        return dbefore if here is None else _where(here.begins, None, dbefore), (dx, du)

    zero = jax.tree.map(jnp.zeros_like, first)
    inputs = (x, u, before, where, dstates)
    dfirst, (dx, du) = jax.lax.scan(step, zero, inputs, reverse=True)
    flat = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731
    dkernel = jax.lax.dot_general(flat(before["hidden"]), flat(du), (((0,), (0,)), ((), ())))
    return dx, dkernel, flat(du).sum(0).astype(bias.dtype), dfirst, None


steps.defvjp(_steps_forward, _steps_backward)


# --- what is left of a gradient ---------------------------------------------------------------------------------------


def gradient_flow(cell: str, weights: Weights, x: Float[Array, "B T I"]) -> Float[Array, "B T"]:
    """How much of a gradient at the last output arrives k steps before it, for k = 0 .. T - 1: a power of ten.

    That is ``log10(||d h_T / d h_{T-k}|| / sqrt(D))``, the Frobenius norm of one row's Jacobian by the hidden state,
    which is 0 at k = 0 (1211.5063, section 2.1). The Jacobian is brought back to norm 1 after every step, so what has
    vanished far beyond the smallest float32 is still told.
    """
    ahead = add_bias(einsum("...i,io->...o", x.swapaxes(0, 1), weights["input"]["kernel"]), weights["input"]["bias"])
    kernel, bias = weights["recurrent"]["kernel"], weights["recurrent"]["bias"]
    width = kernel.shape[0]
    first = zero_state(cell, x.shape[0], width, str(x.dtype))
    states = steps_plain(cell, ahead, kernel, bias, first, None)

    def back(carry, inputs):
        (jacobian, size), (x, before) = carry, inputs
        step = lambda state: jax.tree.map(lambda y: y[0], steps_plain(cell, x[None], kernel, bias, state, None))  # noqa: E731
        (jacobian,) = jax.vmap(jax.vjp(step, before)[1])(jacobian)
        squares = {name: jnp.square(rows).sum((0, 2)) for name, rows in jacobian.items()}
        norm = jnp.sqrt(sum(squares.values()))
        arrived = size + 0.5 * jnp.log10(squares["hidden"] / width)
        jacobian = jax.tree.map(lambda rows: rows / norm[None, :, None], jacobian)
        return (jacobian, size + jnp.log10(norm)), arrived

    start = jax.tree.map(lambda one: jnp.zeros((width, *one.shape), one.dtype), first)
    start["hidden"] += jnp.eye(width)[:, None, :]
    # The state before step t is the one after t - 1: from the last step to the second.
    inputs = (ahead[1:], jax.tree.map(lambda one: one[:-1], states))
    arrived = jax.lax.scan(back, (start, jnp.zeros(x.shape[0])), inputs, reverse=True)[1]
    return jnp.concatenate([jnp.zeros((1, x.shape[0])), arrived[::-1]]).T
