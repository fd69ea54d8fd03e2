"""The kernels of the selective scan for GPUs, through Triton.

The grid is rows x blocks of channels; each program goes through all chunks of its tokens with the states in registers.
The backward pass writes the states of one chunk to a scratch array, which is small enough to stay in the cache.

Triton's arrays have sides of powers of two: states and channels are filled up with some whose input and output are 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from xylem.models.selective_scan_step import advance, pull

F32 = jnp.float32
BLOCK = 64  # channels a program


def forward(rule: str, chunk: int, interpret: bool, A: Array, start: Array, *tokens: Array) -> Any:
    """(A, start, x, delta, B, C, keep) -> outputs, last states, and the states before every chunk."""
    (states, inner), filled = A.shape, _fill("A", A)
    kinds = ["state", "channels", "channels", "states", "states", "keep"]
    arrays = [_fill(kind, array) for kind, array in zip(kinds, (start, *tokens), strict=True)]
    body, outputs = partial(_forward, rule, chunk), ["channels", "state", "before"]
    y, last, before = _call(body, chunk, interpret, ["A", *kinds], outputs, filled, *arrays)
    return y[..., :inner], last[:, :states, :inner], before[:, :, :states, :inner]


def backward(rule: str, chunk: int, interpret: bool, A: Array, before: Array, *rest: Array) -> Any:
    """(A, before, x, delta, B, C, keep, dy, dlast) -> gradients of A, start, x, delta, B and C."""
    (states, inner), filled = A.shape, _fill("A", A)
    kinds = ["before", "channels", "channels", "states", "states", "keep", "channels", "state"]
    arrays = [_fill(kind, array) for kind, array in zip(kinds, (before, *rest), strict=True)]
    outputs = ["state", "state", "channels", "channels", "part", "part", "scratch"]
    body = partial(_backward, rule, chunk, interpret)
    dA, dstart, dx, ddelta, dB, dC, _ = _call(body, chunk, interpret, ["A", *kinds], outputs, filled, *arrays)
    # Each row has its own gradient of A, each block of channels its own part of those of B and C.
    dA, dstart = dA.sum(0)[:states, :inner], dstart[:, :states, :inner]
    return dA, dstart, dx[..., :inner], ddelta[..., :inner], dB.sum(1)[..., :states], dC.sum(1)[..., :states]


def _token(t, x_ref, delta_ref, B_ref, keep_ref):
    return x_ref[t][None], delta_ref[t][None], B_ref[t][:, None], keep_ref[t]


def _forward(rule, size, A_ref, start_ref, x_ref, delta_ref, B_ref, C_ref, keep_ref, y_ref, last_ref, before_ref):
    A = A_ref[...]

    def chunk(k, h):
        before_ref[k] = h

        def step(t, h):
            h = advance(rule, A, h, *_token(t, x_ref, delta_ref, B_ref, keep_ref))
            y_ref[t] = jnp.sum(h * C_ref[t][:, None], axis=0)
            return h

        return jax.lax.fori_loop(k * size, (k + 1) * size, step, h)

    last_ref[...] = jax.lax.fori_loop(0, x_ref.shape[0] // size, chunk, start_ref[...])


def _backward(
    rule, size, interpret, A_ref, before_ref, x_ref, delta_ref, B_ref, C_ref, keep_ref, dy_ref, dlast_ref,
    dA_ref, dstart_ref, dx_ref, ddelta_ref, dB_ref, dC_ref, h_ref,
):  # fmt: skip
    A, chunks = A_ref[...], x_ref.shape[0] // size

    def barrier():
        """Threads may read from the scratch array what others wrote."""
        if not interpret:
            plgpu.debug_barrier()

    def chunk(done, carry):
        first = (chunks - 1 - done) * size

        def again(i, h):
            h_ref[i] = h
            return advance(rule, A, h, *_token(first + i, x_ref, delta_ref, B_ref, keep_ref))

        def back(step, carry):
            g, dA, after = carry
            i = size - 1 - step
            t = first + i
            x, delta, B, keep = _token(t, x_ref, delta_ref, B_ref, keep_ref)
            before, dy = h_ref[i], dy_ref[t][None]
            g, more, dx, ddelta, dB = pull(rule, A, g, before, x, delta, B, C_ref[t][:, None], keep, dy)
            dx_ref[t], ddelta_ref[t], dB_ref[t] = dx[0], ddelta[0], dB[:, 0]
            dC_ref[t] = jnp.sum(after * dy, axis=1)
            return g, dA + more, before

        barrier()
        after = jax.lax.fori_loop(0, size, again, before_ref[chunks - 1 - done])
        barrier()
        g, dA, _ = jax.lax.fori_loop(0, size, back, (*carry, after))
        return g, dA

    g, dA = jax.lax.fori_loop(0, chunks, chunk, (dlast_ref[...], jnp.zeros_like(A)))
    dstart_ref[...] = g
    dA_ref[...] = dA


def _fill(kind: str, array: Array) -> Array:
    """The array with as many states as a power of two, and as many channels as a multiple of ``BLOCK``."""
    if kind == "keep":
        return array[..., 0]
    grow = lambda size: pl.next_power_of_2(size) - size  # noqa: E731
    last = grow(array.shape[-1]) if kind == "states" else -array.shape[-1] % BLOCK
    before = grow(array.shape[-2]) if kind in ("A", "state", "before") else 0
    widths = [(0, 0)] * (array.ndim - 2) + [(0, before), (0, last)]
    return jnp.pad(array, widths, constant_values=-1.0 if kind == "A" else 0.0)


def _call(
    body: Any, chunk: int, interpret: bool, inputs: list[str], outputs: list[str], A: Array, *arrays: Array
) -> Any:
    (batch, length, inner), states = arrays[1].shape, A.shape[0]
    blocks, chunks = inner // BLOCK, length // chunk
    specs = {
        "A": pl.BlockSpec((states, BLOCK), lambda b, i: (0, i)),
        "state": pl.BlockSpec((None, states, BLOCK), lambda b, i: (b, 0, i)),
        "before": pl.BlockSpec((None, chunks, states, BLOCK), lambda b, i: (b, 0, 0, i)),
        "channels": pl.BlockSpec((None, length, BLOCK), lambda b, i: (b, 0, i)),
        "states": pl.BlockSpec((None, length, states), lambda b, i: (b, 0, 0)),
        "keep": pl.BlockSpec((None, length), lambda b, i: (b, 0)),
        "part": pl.BlockSpec((None, None, length, states), lambda b, i: (b, i, 0, 0)),
        "scratch": pl.BlockSpec((None, chunk, states, BLOCK), lambda b, i: (b, 0, 0, i)),
    }
    shapes = {
        "state": (batch, states, inner),
        "before": (batch, chunks, states, inner),
        "channels": (batch, length, inner),
        "part": (batch, blocks, length, states),
        "scratch": (batch, chunk, states, inner),
    }
    return pl.pallas_call(
        body,
        grid=(batch, blocks),
        in_specs=[specs[kind] for kind in inputs],
        out_specs=[specs[kind] for kind in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[kind], F32) for kind in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(A, *arrays)
