"""Weights of four bits (QLoRA 2305.14314): NormalFloat and four-bit floats in blocks, the blocks' scales in 8 bits.

Codes, scales and decoded values are those of bitsandbytes on a CPU, to the bit, for the same matrix stored as torch
stores it, (out, in): blocks run along a column of ours. Differences that this leaves, all of one unit in the last
place of a float32: its mean of scales depends on the machine's order of addition, its 8-bit table on fused products.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int, UInt8

from xylem.models.leaves import Leaf, aligned, decoded_product

Kind = Literal["nf4", "fp4"]
Statistics = Literal["double", "single"]
# The value of each code over its block's largest. NF4: 2305.14314, appendix E; its quantiles are equally likely under
# a normal distribution. FP4: sign, two bits of exponent, one of fraction, in twelfths (bitsandbytes, functional.py).
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_NORMAL = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
VALUES: dict[str, np.ndarray] = {
    "nf4": np.array(_NORMAL.split(), np.float32),
    # 0 - x: bitsandbytes knows no negative zero.
    "fp4": np.array([*_TWELFTHS, *(0.0 - value for value in _TWELFTHS)], np.float32) / np.float32(12),
}


@struct.dataclass
class Quantized4(Leaf):
    """Two codes a byte, the earlier row's above; one scale for each ``block`` rows of a column.

    Rows are filled up with zeros to whole blocks. Of doubly quantized statistics ``scales`` are codes, ``peaks`` the
    largest magnitude of each ``group`` of scales (column by column) and ``offset`` the mean taken off them first.
    """

    codes: UInt8[Array, "*L I2 O"] | Any
    scales: Float32[Array, "*L J O"] | UInt8[Array, "*L J O"] | Any
    peaks: Float32[Array, "*L G"] | Any | None
    offset: Float32[Array, "*L"] | Any | None
    rows: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    kind: Kind = struct.field(pytree_node=False)
    stored: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.stored)

    def einsum(self, equation: str, x: Array) -> Array:
        return decoded_product(equation, x, self)

    def take(self, ids: Int[Array, "..."]) -> Array:
        byte = jnp.take(self.codes, ids // 2, axis=0)
        codes = jnp.where((ids % 2 == 0)[..., None], byte >> 4, byte & 15)
        scales = jnp.take(self._scales(), ids // self._block(), axis=0)
        return (_look_up(VALUES[self.kind], codes) * scales).astype(self.dtype)

    def materialize(self) -> Array:
        scales = jnp.repeat(self._scales(), self._block() // 2, axis=-2)
        halves = [_look_up(VALUES[self.kind], half) * scales for half in (self.codes >> 4, self.codes & 15)]
        # The type first: what is interleaved is then the smaller array.
        weight = jnp.stack([half.astype(self.dtype) for half in halves], axis=-2)
        weight = weight.reshape(*weight.shape[:-3], -1, weight.shape[-1])
        return weight[..., : self.rows, :]

    def _block(self) -> int:
        return 2 * self.codes.shape[-2] // self.scales.shape[-2]

    def _scales(self) -> Float32[Array, "*L J O"]:
        if self.peaks is None or self.offset is None:
            return self.scales
        *layers, blocks, columns = self.scales.shape
        peaks = jnp.repeat(self.peaks, self.group, axis=-1)[..., : blocks * columns]
        peaks = peaks.reshape(*layers, columns, blocks).mT
        part = jnp.asarray(SCALES)[self.scales] * peaks
        # No scale is beyond its peak. Said aloud, this keeps product and sum from being rounded as one.
        return jnp.clip(part, -peaks, peaks) + self.offset[..., None, None]

    def rebase(self, weight: Array) -> Any:
        raise ValueError("a quantized base is not rounded again: that would change the weights; keep the base")

    def specs(self, weight_spec: PartitionSpec) -> Quantized4:
        """Codes lie as the weight does. Scales are whole along its rows, where a part need not hold whole blocks, and
        peaks are whole, which know no columns: 1/64 and 1/4096 byte a weight."""
        *layers, rows, columns = aligned(weight_spec, len(self.shape))
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("rows", "group", "kind", "stored")}
        return Quantized4(
            codes=PartitionSpec(*layers, rows, columns),
            scales=PartitionSpec(*layers, None, columns),
            peaks=None if self.peaks is None else PartitionSpec(*layers, None),
            offset=None if self.offset is None else PartitionSpec(*layers),
            **parts,
        )


@partial(jax.jit, static_argnames=("kind", "statistics", "block", "group"))
def quantize4(
    weight: Float[Array, "*L I O"],
    kind: Kind = "nf4",
    statistics: Statistics = "double",
    block: int = 64,
    group: int = 256,
) -> Quantized4:
    """The nearest codes, scaled by the largest magnitude of each ``block`` rows of a column (2305.14314, section 3).

    ``double`` statistics: the scales less their mean are coded in 8 bits, ``group`` by ``group``. One layer is worked
    on at a time, so that little more memory is needed than the weight's.
    """
    *layers, rows, columns = weight.shape

    def one(matrix: Array) -> tuple:
        padded = jnp.pad(matrix.astype(jnp.float32), ((0, -rows % block), (0, 0))).reshape(-1, block, columns)
        scales = jnp.max(jnp.abs(padded), axis=1)
        inverse = jnp.where(scales > 0, 1.0 / scales, 0.0)
        codes = _nearest4(padded * inverse[:, None], kind).reshape(-1, 2, columns)
        packed = codes[:, 0] << 4 | codes[:, 1]
        return packed, *(_doubly(scales, group) if statistics == "double" else (scales, None, None))

    made = jax.lax.map(one, weight.reshape(-1, rows, columns))
    parts = jax.tree.map(lambda x: x.reshape(*layers, *x.shape[1:]), made)
    return Quantized4(*parts, rows=rows, group=group, kind=kind, stored=weight.dtype.name)


def _nearest4(x: Float32[Array, "J K O"], kind: Kind) -> UInt8[Array, "J K O"]:
    """The code of the nearest value; halfway between two it is the lower one."""
    order = np.argsort(VALUES[kind], kind="stable")
    ascending = VALUES[kind][order]
    place = jnp.zeros(x.shape, jnp.uint8)
    for bound in (ascending[1:] + ascending[:-1]) / np.float32(2):
        place += (x > bound).astype(jnp.uint8)
    return _look_up(order.astype(np.uint8), place)


def _doubly(scales: Float32[Array, "J O"], group: int) -> tuple[Array, Array, Array]:
    """Scales as codes of 8 bits, the largest magnitude of each group, and the mean taken off first."""
    blocks, columns = scales.shape
    pad = lambda x: jnp.pad(x, (0, -x.size % group)).reshape(-1, group)  # noqa: E731
    # XLA multiplies by a known number's reciprocal, which is not rounded as the quotient is.
    count = jax.lax.optimization_barrier(jnp.float32(scales.size))
    offset = pad(scales.T.reshape(-1)).sum(axis=1).sum() / count
    groups = pad((scales - offset).T.reshape(-1))
    peaks = jnp.max(jnp.abs(groups), axis=1)
    inverse = jnp.where(peaks > 0, 1.0 / peaks, 0.0)
    # bitsandbytes rounds to 65536 steps before it looks for the nearest value (csrc/cpu_ops.cpp, norm_to_lut_index).
    step = ((jnp.clip(groups * inverse[:, None], -1.0, 1.0) + 1.0) * 0.5 * 65535.0 + 0.5).astype(jnp.int32)
    codes = jnp.where(peaks[:, None] > 0, jnp.asarray(_NEAREST8)[step], 0)
    return codes.reshape(-1)[: blocks * columns].reshape(columns, blocks).T, peaks, offset


def _look_up(table: np.ndarray, codes: UInt8[Array, "..."]) -> Array:
    """``table[codes]`` by choices bit by bit, which vector units do where they cannot gather."""
    level = [jnp.full(codes.shape, value) for value in table]
    for bit in range(int(math.log2(len(table)))):
        chosen = (codes >> bit & 1).astype(bool)
        level = [jnp.where(chosen, odd, even) for even, odd in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _dynamic_values() -> np.ndarray:
    """The 256 values of 8-bit dynamic exponents (1511.04561, section 2.3; bitsandbytes, ``create_dynamic_map``): the
    midpoints of 2^i equal steps from 0.1 to 1, times 10^(i - 6), with both signs; and 0 and 1."""
    single = np.float32
    found = [single(0), single(1)]
    for exponent in range(7):
        steps = 2**exponent
        width, index = np.float64(single((single(1) - single(0.1)) / single(steps))), np.arange(steps + 1)
        # Counted from the nearer end, as torch does.
        below, above = np.float64(single(0.1)) + index * width, 1.0 - (steps - index) * width
        bounds = np.where(index < (steps + 1) // 2, below, above).astype(single)
        means = (bounds[1:] + bounds[:-1]) / single(2) * single(10.0 ** (exponent - 6))
        found += [*means, *-means]
    return np.sort(np.array(found, single))


SCALES = _dynamic_values()
_NEAREST8 = np.searchsorted((SCALES[1:] + SCALES[:-1]) / 2, np.linspace(-1, 1, 65536), side="left").astype(np.uint8)
