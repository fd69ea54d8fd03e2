"""The kernels of the selective scan for TPUs.

The grid is rows x blocks of channels x chunks of tokens, the chunks in order: what a chunk leaves behind waits in
vector memory for the next.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from xylem.models.selective_scan_step import advance, pull

F32 = jnp.float32
BLOCK = 512  # channels a block: of 16 states each, a chunk's take 2 MiB of vector memory in the backward pass


def forward(rule: str, chunk: int, interpret: bool, *arrays: Array) -> Any:
    """(A, start, x, delta, B, C, keep) -> outputs, last states, and the states before every chunk."""
    return _call(partial(_forward, rule), False, chunk, interpret, *arrays)


def backward(rule: str, chunk: int, interpret: bool, *arrays: Array) -> Any:
    """(A, before, x, delta, B, C, keep, dy, dlast) -> gradients of A, start, x, delta, B and C."""
    dA, dstart, dx, ddelta, dB, dC = _call(partial(_backward, rule), True, chunk, interpret, *arrays)
    # Each row has its own gradient of A, each block of channels its own part of those of B and C.
    return dA.sum(0), dstart, dx, ddelta, dB.sum(1), dC.sum(1)


def _forward(rule, A_ref, start_ref, x_ref, delta_ref, B_ref, C_ref, keep_ref, y_ref, last_ref, before_ref, h_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        h_ref[...] = start_ref[...]

    A = A_ref[...]
    before_ref[...] = h_ref[...]

    def step(t, h):
        at = pl.ds(t, 1)
        h = advance(rule, A, h, x_ref[at], delta_ref[at], _column(B_ref[at]), keep_ref[at])
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

    def again(t, h):
        at = pl.ds(t, 1)
        h_ref[t] = h
        return advance(rule, A, h, x_ref[at], delta_ref[at], _column(B_ref[at]), keep_ref[at])

    def back(step, carry):
        g, dA, after = carry
        t = size - 1 - step
        at = pl.ds(t, 1)
        x, delta, B, C, before, dy = (
            x_ref[at], delta_ref[at], _column(B_ref[at]), _column(C_ref[at]), h_ref[t], dy_ref[at]
        )  # fmt: skip
        g, more, dx_ref[at], ddelta_ref[at], dB = pull(rule, A, g, before, x, delta, B, C, keep_ref[at], dy)
        dB_ref[at] = _row(dB)
        dC_ref[at] = _row(jnp.sum(after * dy, axis=1, keepdims=True))
        return g, dA + more, before

    after = jax.lax.fori_loop(0, size, again, before_ref[...])
    g, dA, _ = jax.lax.fori_loop(0, size, back, (g_ref[...], dA_ref[...], after))
    g_ref[...] = dstart_ref[...] = g
    dA_ref[...] = dA


def _column(row: Array) -> Array:
    """(1, Z) -> (Z, 1), by a mask: the compiler turns no vector by itself."""
    return jnp.sum(jnp.where(_eye(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def _row(column: Array) -> Array:
    """(Z, 1) -> (1, Z)."""
    return jnp.sum(jnp.where(_eye(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _eye(size: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _call(body: Any, reverse: bool, chunk: int, interpret: bool, A: Array, *arrays: Array) -> Any:
    (batch, length, inner), states = arrays[1].shape, A.shape[0]
    block = next((size for size in (BLOCK, BLOCK // 2, BLOCK // 4) if inner % size == 0), inner)
    blocks, chunks = inner // block, length // chunk
    order = (lambda k: chunks - 1 - k) if reverse else (lambda k: k)
    specs = {
        "A": pl.BlockSpec((states, block), lambda b, i, k: (0, i)),
        "state": pl.BlockSpec((None, states, block), lambda b, i, k: (b, 0, i)),
        "before": pl.BlockSpec((None, None, states, block), lambda b, i, k: (b, order(k), 0, i)),
        "channels": pl.BlockSpec((None, chunk, block), lambda b, i, k: (b, order(k), i)),
        "states": pl.BlockSpec((None, chunk, states), lambda b, i, k: (b, order(k), 0)),
        "keep": pl.BlockSpec((None, chunk, 1), lambda b, i, k: (b, order(k), 0)),
        "part": pl.BlockSpec((None, None, chunk, states), lambda b, i, k: (b, i, order(k), 0)),
    }
    shapes = {
        "state": (batch, states, inner),
        "before": (batch, chunks, states, inner),
        "channels": (batch, length, inner),
        "part": (batch, blocks, length, states),
    }
    tokens: list[str] = ["channels", "channels", "states", "states", "keep"]
    scratch: list[tuple[int, ...]] = [(states, block)]
    if reverse:
        inputs = ["A", "before", *tokens, "channels", "state"]
        outputs = ["state", "state", "channels", "channels", "part", "part"]
        scratch.append((chunk, states, block))
    else:
        inputs, outputs = ["A", "state", *tokens], ["channels", "state", "before"]
    return pl.pallas_call(
        body,
        grid=(batch, blocks, chunks),
        in_specs=[specs[kind] for kind in inputs],
        out_specs=[specs[kind] for kind in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[kind], F32) for kind in outputs],
        scratch_shapes=[pltpu.VMEM(shape, F32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(A, *arrays)
