"""The selective scan as two Pallas kernels for TPUs, one each way.

The grid is rows x blocks of channels x chunks of tokens, the chunks in order: the states of a block stay in vector
memory while its tokens stream past, and only what the layer reads and writes anyway goes through main memory (the
hardware-aware scan of 2312.00752, section 3.3.2), with one state a chunk for the backward pass. That one goes through
the chunks in reverse, computes the states of each again and pulls the gradient back through them, as ``chunked`` does.

Off TPUs the kernels are interpreted: slow, and the same numbers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

F32 = jnp.float32
CHUNK = 64  # tokens a chunk
BLOCK = 512  # channels a block: of 16 states each, a chunk's take 2 MiB of vector memory in the backward pass


def kernel(
    rule: str, x: Array, delta: Array, A: Array, B: Array, C: Array, keep: Array, start: Array
) -> tuple[Array, Array]:
    """Outputs (B, T, I) and last states (B, Z, I); ``A`` is (Z, I), all is float32."""
    length = x.shape[1]
    # Steps of size 0 fill the last chunk: they leave the states as they are.
    fill = lambda value: jnp.pad(value, [(0, 0), (0, -length % CHUNK), (0, 0)])  # noqa: E731
    keep = jnp.pad(keep, [(0, 0), (0, -length % CHUNK)], constant_values=1.0)[..., None]
    out: Any = _scan(rule, A, start, fill(x), fill(delta), fill(B), fill(C), keep)
    return out[0][:, :length], out[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(rule: str, *args: Array) -> tuple[Array, Array]:
    return _scan_forward(rule, *args)[0]


def _scan_forward(rule, A, start, x, delta, B, C, keep):
    y, last, before = _call(partial(_forward, rule), "forward", A, start, x, delta, B, C, keep)
    return (y, last), (A, before, x, delta, B, C, keep)


def _scan_backward(rule, saved, slopes):
    A, before, *tokens = saved
    dA, dstart, dx, ddelta, dB, dC = _call(partial(_backward, rule), "backward", A, before, *tokens, *slopes)
    # Each row has its own gradient of A, each block of channels its own part of those of B and C.
    return dA.sum(0), dstart, dx, ddelta, dB.sum(1), dC.sum(1), None


_scan.defvjp(_scan_forward, _scan_backward)


# --- one step and its derivative --------------------------------------------------------------------------------------


def _discretize(rule: str, delta: Array, A: Array) -> tuple[Any, ...]:
    """Decay, input weight, and the weight's derivatives by delta and by A, of one token: (Z, I), (1, I) or numbers."""
    decay = jnp.exp(delta * A)
    if rule == "euler":
        return decay, delta, 1.0, 0.0
    half = jnp.tanh(0.5 * delta * A)  # exp(v) - 1 = 2 tanh(v / 2) / (1 - tanh(v / 2)): Mosaic has no expm1
    weight = 2.0 * half / (1.0 - half) / A
    return decay, weight, decay, (delta * decay - weight) / A


def _column(row: Array) -> Array:
    """(1, Z) -> (Z, 1), by a mask: the compiler turns no vector by itself."""
    return jnp.sum(jnp.where(_eye(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def _row(column: Array) -> Array:
    """(Z, 1) -> (1, Z)."""
    return jnp.sum(jnp.where(_eye(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _eye(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


# --- the kernels ------------------------------------------------------------------------------------------------------


def _forward(rule, A_ref, start_ref, x_ref, delta_ref, B_ref, C_ref, keep_ref, y_ref, last_ref, before_ref, h_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        h_ref[...] = start_ref[...]

    A = A_ref[...]
    before_ref[...] = h_ref[...]

    def step(t, h):
        at = pl.ds(t, 1)
        decay, weight, _, _ = _discretize(rule, delta_ref[at], A)
        h = keep_ref[at] * decay * h + weight * x_ref[at] * _column(B_ref[at])
        y_ref[at] = jnp.sum(h * _column(C_ref[at]), axis=0, keepdims=True)
        return h

    h_ref[...] = jax.lax.fori_loop(0, x_ref.shape[0], step, h_ref[...])
    last_ref[...] = h_ref[...]


def _backward(
    rule, A_ref, before_ref, x_ref, delta_ref, B_ref, C_ref, keep_ref, dy_ref, dlast_ref,
    dA_ref, dstart_ref, dx_ref, ddelta_ref, dB_ref, dC_ref, g_ref, h_ref,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        g_ref[...] = dlast_ref[...]
        dA_ref[...] = jnp.zeros_like(dA_ref)

    A, size = A_ref[...], x_ref.shape[0]

    def forward(t, h):
        at = pl.ds(t, 1)
        decay, weight, _, _ = _discretize(rule, delta_ref[at], A)
        h_ref[t] = h
        return keep_ref[at] * decay * h + weight * x_ref[at] * _column(B_ref[at])

    def back(step, carry):
        g, dA, after = carry
        t = size - 1 - step
        at = pl.ds(t, 1)
        x, delta, dy, B, before = x_ref[at], delta_ref[at], dy_ref[at], _column(B_ref[at]), h_ref[t]
        decay, weight, by_delta, by_A = _discretize(rule, delta, A)
        g = g + _column(C_ref[at]) * dy
        gB, dbefore = g * B, g * keep_ref[at] * decay
        q = dbefore * before
        dx_ref[at] = jnp.sum(gB * weight, axis=0, keepdims=True)
        ddelta_ref[at] = jnp.sum(q * A + gB * x * by_delta, axis=0, keepdims=True)
        dB_ref[at] = _row(jnp.sum(g * (weight * x), axis=1, keepdims=True))
        dC_ref[at] = _row(jnp.sum(after * dy, axis=1, keepdims=True))
        return dbefore, dA + q * delta + gB * x * by_A, before

    after = jax.lax.fori_loop(0, size, forward, before_ref[...])
    g, dA, _ = jax.lax.fori_loop(0, size, back, (g_ref[...], dA_ref[...], after))
    g_ref[...] = dstart_ref[...] = g
    dA_ref[...] = dA


def _call(body: Any, direction: str, A: Array, *arrays: Array) -> Any:
    """Run ``_forward`` on (start, x, delta, B, C, keep), or ``_backward`` on (before, x, ..., keep, dy, dlast)."""
    (batch, length, inner), states = arrays[1].shape, A.shape[0]
    block = next((size for size in (BLOCK, BLOCK // 2, BLOCK // 4) if inner % size == 0), inner)
    blocks, chunks = inner // block, length // CHUNK
    order = (lambda k: k) if direction == "forward" else (lambda k: chunks - 1 - k)

    def spec(kind: str) -> pl.BlockSpec:
        return {
            "A": pl.BlockSpec((states, block), lambda b, i, k: (0, i)),
            "state": pl.BlockSpec((None, states, block), lambda b, i, k: (b, 0, i)),
            "before": pl.BlockSpec((None, None, states, block), lambda b, i, k: (b, order(k), 0, i)),
            "channels": pl.BlockSpec((None, CHUNK, block), lambda b, i, k: (b, order(k), i)),
            "states": pl.BlockSpec((None, CHUNK, states), lambda b, i, k: (b, order(k), 0)),
            "keep": pl.BlockSpec((None, CHUNK, 1), lambda b, i, k: (b, order(k), 0)),
            "part": pl.BlockSpec((None, None, CHUNK, states), lambda b, i, k: (b, i, order(k), 0)),
        }[kind]

    shapes = {
        "state": (batch, states, inner),
        "before": (batch, chunks, states, inner),
        "channels": (batch, length, inner),
        "part": (batch, blocks, length, states),
    }
    tokens = ["channels", "channels", "states", "states", "keep"]
    if direction == "forward":
        inputs, outputs, scratch = ["A", "state", *tokens], ["channels", "state", "before"], []
    else:
        inputs = ["A", "before", *tokens, "channels", "state"]
        outputs, scratch = ["state", "state", "channels", "channels", "part", "part"], [(CHUNK, states, block)]

    def run(*args, interpret):
        return pl.pallas_call(
            body,
            grid=(batch, blocks, chunks),
            in_specs=[spec(kind) for kind in inputs],
            out_specs=[spec(kind) for kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(shapes[kind], F32) for kind in outputs],
            scratch_shapes=[pltpu.VMEM(shape, F32) for shape in [(states, block), *scratch]],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(*args)

    choices = {"tpu": partial(run, interpret=False), "default": partial(run, interpret=True)}
    return jax.lax.platform_dependent(A, *arrays, **choices)
