"""A weight is a leaf that knows how to contract.

Wherever the models multiply by a weight they call ``layers.einsum``; when the weight is not an array, it is one of
these, and does the product itself. So a method that changes weights (low rank, quantized, ...) replaces leaves of the
parameter tree and no model knows of it. Leaves nest: ``LowRank(base=Quantized(...))`` is QLoRA's layout.

Every leaf is a pytree whose arrays carry the same leading layer axis as the weight they stand for, so that scanning
over layers slices a leaf as it slices an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int8

from xylem.models import fused


class Leaf:
    """What a weight must offer when it is not an array.

    ``shape`` and ``dtype`` are those of the weight it stands for. ``specs`` gives the sharding of its own parts from
    that of the weight: a leaf of PartitionSpecs of the same type.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight this stands for."""
        raise NotImplementedError

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the weight this stands for."""
        raise NotImplementedError

    def einsum(self, equation: str, x: Array) -> Array:
        """``jnp.einsum(equation, x, weight)``, in the type of ``x``."""
        raise NotImplementedError

    def take(self, ids: Int[Array, "..."]) -> Array:
        """Rows ``ids`` of the weight: the look-up of an embedding table."""
        raise NotImplementedError

    def ragged_dot(self, x: Array, group_sizes: Int[Array, "E"]) -> Array:
        """``jax.lax.ragged_dot(x, weight, group_sizes)``: rows of ``x`` in groups, one matrix a group."""
        return jax.lax.ragged_dot(x, self.materialize().astype(x.dtype), group_sizes)

    def materialize(self) -> Array:
        """The weight as one plain array."""
        raise NotImplementedError

    def beside(self, bias: Array) -> Array:
        """The bias that is added to this weight's product, where the method changes that too; linear in ``bias``."""
        return bias

    def rebase(self, weight: Array) -> Any:
        """This leaf on another base, with which it stands for ``weight``: undoes ``materialize`` within rounding."""
        raise NotImplementedError

    def specs(self, weight_spec: PartitionSpec) -> Any:
        """This leaf with a PartitionSpec in place of each array, given the weight's own."""
        raise NotImplementedError


def is_leaf(value: Any) -> bool:
    """True for what stands for a weight but is no array; the ``is_leaf`` of tree maps over weights."""
    return isinstance(value, Leaf)


def plain(weight: Any) -> Any:
    """A weight as one plain array, whatever it is made of."""
    return weight.materialize() if isinstance(weight, Leaf) else weight


def bias_of(kernel: Array | Leaf, bias: Array) -> Array:
    """The bias to add to a product with ``kernel``, whatever the weight is made of."""
    return kernel.beside(bias) if isinstance(kernel, Leaf) else bias


def with_biases(params: Any, change: Callable[[Leaf, Array], Array] = bias_of) -> Any:
    """The tree with ``change(kernel, bias)`` in place of each bias beside a kernel that is no array."""
    if not isinstance(params, Mapping):
        return params
    made = {name: with_biases(part, change) for name, part in params.items()}
    if is_leaf(made.get("kernel")) and "bias" in made:
        made["bias"] = change(made["kernel"], made["bias"])
    return made


def materialize(params: Any) -> Any:
    """The same tree with every leaf replaced by the plain array it stands for, and the biases beside them by theirs."""
    return jax.tree.map(plain, with_biases(params), is_leaf=is_leaf)


def contract(equation: str, x: Array, weight: Array | Leaf) -> Array:
    """``einsum(equation, x, weight)`` in the type of ``x``, whatever the weight is made of."""
    return weight.einsum(equation, x) if isinstance(weight, Leaf) else jnp.einsum(equation, x, weight.astype(x.dtype))


def take(weight: Array | Leaf, ids: Array) -> Array:
    """Rows ``ids`` of a table, whatever it is made of."""
    return weight.take(ids) if isinstance(weight, Leaf) else jnp.take(weight, ids, axis=0)


@partial(jax.checkpoint, static_argnums=0)
def decoded_product(equation: str, x: Array, weight: Leaf) -> Array:
    """``einsum`` with a weight that is decoded anew for the gradient of ``x``: its plain array is not kept, and learns
    nothing itself."""
    return jnp.einsum(equation, x, jax.lax.stop_gradient(weight.materialize()).astype(x.dtype))


@struct.dataclass
class Transposed(Leaf):
    """A matrix that is held as its transpose: XLA:CPU multiplies few rows fastest by that (``fused.few_rows``)."""

    rows: Float[Array, "*L O I"] | Any

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, outputs, inputs = self.rows.shape
        return (*layers, inputs, outputs)

    @property
    def dtype(self) -> jnp.dtype:
        return self.rows.dtype

    def einsum(self, equation: str, x: Array) -> Array:
        inputs, output = equation.split("->")
        x_axes, (first, second) = inputs.split(",")
        if x_axes.replace(first, second) != output:
            return jnp.einsum(f"{x_axes},{second}{first}->{output}", x, self.rows.astype(x.dtype))
        y = fused.few_rows(x.reshape(-1, x.shape[-1]), self.rows.astype(x.dtype))
        return y.reshape(*x.shape[:-1], y.shape[-1]).astype(x.dtype)

    def take(self, ids: Int[Array, "..."]) -> Array:
        return jnp.moveaxis(jnp.take(self.rows, ids, axis=1), 0, -1)

    def materialize(self) -> Array:
        return self.rows.mT

    def rebase(self, weight: Array) -> Transposed:
        return Transposed(weight.mT)

    def specs(self, weight_spec: PartitionSpec) -> Transposed:
        *layers, rows, columns = aligned(weight_spec, len(self.shape))
        return Transposed(PartitionSpec(*layers, columns, rows))


def aligned(spec: PartitionSpec, ndim: int) -> list:
    """The entries of ``spec`` for an array of ``ndim`` axes: specs are right-aligned here as in sharding.RULES."""
    return [None] * (ndim - len(spec)) + list(spec)


class Grafted(Leaf):
    """A leaf that adds to another weight, its ``base``, and stands for one of the same shape and type."""

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def base_specs(self, weight_spec: PartitionSpec) -> Any:
        """The base's part of ``specs``."""
        return self.base.specs(weight_spec) if isinstance(self.base, Leaf) else weight_spec


@struct.dataclass
class LowRank(Grafted):
    """``base + scale * a @ b`` without ever forming it (LoRA 2106.09685, section 4.1)."""

    base: Any
    a: Float[Array, "*L I R"] | Any
    b: Float[Array, "*L R O"] | Any
    scale: Float[Array, "*L"] | Any

    def einsum(self, equation: str, x: Array) -> Array:
        inputs, output = equation.split("->")
        x_axes, weight_axes = inputs.split(",")
        if len(weight_axes) != 2 or "r" in equation:
            raise ValueError(f"{equation!r}: a low-rank weight contracts as a matrix of two axes, neither named r")
        first, second = weight_axes
        # Whichever of the weight's two axes is contracted, the rank-sized product comes first: it is the cheap one.
        near, far = (self.a, self.b) if second in output else (self.b.mT, self.a.mT)
        kept = second if second in output else first
        gone = first if second in output else second
        inner = jnp.einsum(f"{x_axes},{gone}r->{x_axes.replace(gone, 'r')}", x, near.astype(x.dtype))
        outer = jnp.einsum(f"{x_axes.replace(gone, 'r')},r{kept}->{output}", inner, far.astype(x.dtype))
        return contract(equation, x, self.base) + self.scale.astype(x.dtype) * outer

    def take(self, ids: Int[Array, "..."]) -> Array:
        rows = jnp.take(self.a, ids, axis=0) @ self.b
        return take(self.base, ids) + self.scale * rows

    def _delta(self) -> Array:
        return (self.scale[..., None, None] * (self.a @ self.b)).astype(self.dtype)

    def materialize(self) -> Array:
        return plain(self.base) + self._delta()

    def beside(self, bias: Array) -> Array:
        return bias_of(self.base, bias)

    def rebase(self, weight: Array) -> LowRank:
        rest = weight - self._delta()
        base = self.base.rebase(rest) if isinstance(self.base, Leaf) else rest
        return LowRank(base, self.a, self.b, self.scale)

    def specs(self, weight_spec: PartitionSpec) -> LowRank:
        *layers, rows, columns = aligned(weight_spec, len(self.shape))
        return LowRank(
            base=self.base_specs(weight_spec),
            a=PartitionSpec(*layers, rows, None),
            b=PartitionSpec(*layers, None, columns),
            scale=PartitionSpec(*layers),
        )


@struct.dataclass
class Quantized(Leaf):
    """Symmetric 8-bit integers with one scale an output column (LLM.int8() 2208.07339, section 2.1, absmax)."""

    values: Int8[Array, "*L I O"] | Any
    scales: Float32[Array, "*L 1 O"] | Any
    stored: str = struct.field(pytree_node=False, default="float32")

    @classmethod
    def quantize(cls, weight: Float[Array, "*L I O"]) -> Quantized:
        """The nearest representable weight; a column of zeros keeps scale 1.

        The codes are those of bitsandbytes (``int8_vectorwise_quant`` of the transposed matrix).
        """
        peak = jnp.max(jnp.abs(weight), axis=-2, keepdims=True).astype(jnp.float32)
        steps = jnp.where(peak > 0, 127.0 / peak, 1.0)
        values = jnp.round(weight.astype(jnp.float32) * steps).astype(jnp.int8)
        return cls(values=values, scales=jnp.where(peak > 0, peak / 127.0, 1.0), stored=weight.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.stored)

    def einsum(self, equation: str, x: Array) -> Array:
        return decoded_product(equation, x, self)

    def take(self, ids: Int[Array, "..."]) -> Array:
        return (jnp.take(self.values, ids, axis=0) * self.scales[0]).astype(self.dtype)

    def materialize(self) -> Array:
        return (self.values * self.scales).astype(self.dtype)

    def rebase(self, weight: Array) -> Any:
        raise ValueError("a quantized base is not rounded again: that would change the weights; keep the base")

    def specs(self, weight_spec: PartitionSpec) -> Quantized:
        *layers, rows, columns = aligned(weight_spec, len(self.shape))
        values, scales = PartitionSpec(*layers, rows, columns), PartitionSpec(*layers, None, columns)
        return Quantized(values=values, scales=scales, stored=self.stored)
