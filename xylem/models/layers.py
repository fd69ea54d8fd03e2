"""The layers that own weights. Every parameter of every family is made here, so the tree is made in one file.

Kernels are matrices (in, out); heads are split by the caller. A layer reads what the tree holds under its name, an
array or a leaf (``leaves.py``), and checks the shape against what the config asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from xylem.models import fused
from xylem.models.config import TransformerConfig
from xylem.models.fused import Choice
from xylem.models.leaves import Leaf, LowRank, bias_of, contract
from xylem.models.state_config import MambaConfig

Site = Callable[[str, Array], Array]


def einsum(equation: str, x: Array, weight: Array | Leaf, kernels: Choice | None = None) -> Array:
    """``jnp.einsum(equation, x, weight)`` in the type of ``x``; a weight that is no array does the product itself."""
    if kernels is None or not kernels.matmul or equation != "...i,io->...o":
        return contract(equation, x, weight)
    # Flattened tokens: the gradient of a 3-D product transposes its operands first on XLA:CPU.
    rows = x.reshape(-1, x.shape[-1])
    if not isinstance(weight, Leaf):
        y = fused.matmul(rows, weight.astype(x.dtype))
    elif isinstance(weight, LowRank) and _worth_adding(rows, weight):
        y = fused.low_rank(rows, weight.base, weight.a, weight.scale * weight.b)
    else:
        return weight.einsum(equation, x)
    return y.reshape(*x.shape[:-1], y.shape[1])


def _worth_adding(rows: Float[Array, "M I"], weight: LowRank) -> bool:
    """Whether a pair is added to its weight sooner than its product to that of so many rows; all in float32."""
    parts = (rows, weight.base, weight.a, weight.b)
    return (
        not isinstance(weight.base, Leaf)
        and len(rows) >= len(weight.base)
        and all(part.dtype == jnp.float32 for part in parts)
    )


def parameter(
    module: nn.Module,
    name: str,
    std: float | nn.initializers.Initializer | None,
    shape: tuple[int, ...],
    dtype: str,
    fill: Any = 0.0,
):
    """The module's parameter ``name``: what the tree holds, or a new one.

    A new one is normal of ``std``, drawn by it where it is a function, or ``fill``, a number or an array, where it is
    None.

    ``Module.param`` alone would refuse a leaf whose parts have other shapes than the weight it stands for.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if value.shape != shape:
            path = "/".join((*module.path, name))
            raise ValueError(f"{path}: the parameters hold shape {value.shape}, the config asks for {shape}")
        return value
    normal = std if callable(std) or std is None else nn.initializers.normal(std)
    init = nn.initializers.constant(fill) if normal is None else normal
    return module.param(name, init, shape, jnp.dtype(dtype))


def add_bias(x: Float[Array, "*B O"], bias: Float[Array, "O"], kernels: Choice | None = None) -> Float[Array, "*B O"]:
    """Add a vector along the last axis, in the type of ``x``; ``kernels`` as for ``einsum``."""
    add = fused.add_bias if kernels is not None and kernels.matmul else fused.add_bias_plain
    return add(x.reshape(-1, x.shape[-1]), bias).reshape(x.shape)


class Dense(nn.Module):
    """``x @ kernel + bias`` over the last axis."""

    features: int
    std: float
    config: TransformerConfig | MambaConfig
    kernels: Choice

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        stored = self.config.compute.param_dtype
        kernel = parameter(self, "kernel", self.std, (x.shape[-1], self.features), stored)
        y = einsum("...i,io->...o", x, kernel, self.kernels)
        if self.config.bias == "everywhere" or self.has_variable("params", "bias"):
            y = add_bias(y, bias_of(kernel, parameter(self, "bias", None, (self.features,), stored)), self.kernels)
        return y


def side_by_side(
    module: nn.Module,
    joined: str,
    widths: dict[str, int],
    x: Float[Array, "*B I"],
    config: TransformerConfig | MambaConfig,
    kernels: Choice,
) -> list[Float[Array, "*B O"]]:
    """Products of one input with several kernels of the calling module: ``widths`` are their names and columns.

    One product where the tree holds them ``joined`` (``joined.fuse``), one each where it does not.
    """
    if not module.has_variable("params", joined):
        return [Dense(width, config.init.kernel, config, kernels, name=name)(x) for name, width in widths.items()]
    y = Dense(sum(widths.values()), config.init.kernel, config, kernels, name=joined)(x)
    return jnp.split(y, list(accumulate(widths.values()))[:-1], axis=-1)


class Embed(nn.Module):
    """Rows of a table, in the compute type."""

    rows: int
    features: int
    std: float
    config: Any

    @nn.compact
    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        compute = self.config.compute
        table = parameter(self, "embedding", self.std, (self.rows, self.features), compute.param_dtype)
        if isinstance(table, Leaf):
            return table.take(ids).astype(compute.dtype)
        return jnp.take(table, ids, axis=0).astype(compute.dtype)


class Norm(nn.Module):
    """LayerNorm (1607.06450) or RMSNorm (1910.07467), in float32 whatever the compute type."""

    config: TransformerConfig | MambaConfig
    kernels: Choice

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        shape, stored, eps = (x.shape[-1],), self.config.compute.param_dtype, self.config.norm_eps
        scale = parameter(self, "scale", None, shape, stored, fill=1.0).astype(jnp.float32)
        rows = x.reshape(-1, x.shape[-1])
        if self.config.norm == "rmsnorm":
            y = (fused.rms_norm if self.kernels.norm else fused.rms_norm_plain)(rows, scale, eps)
        else:
            bias = parameter(self, "bias", None, shape, stored).astype(jnp.float32)
            y = (fused.layer_norm if self.kernels.norm else fused.layer_norm_plain)(rows, scale, bias, eps)
        return y.reshape(x.shape)


class MLP(nn.Module):
    """Position-wise feed-forward: ``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (2002.05202)."""

    config: TransformerConfig
    kernels: Choice

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        config, kernels = self.config, self.kernels
        flat = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731
        if config.gated:
            widths = {"up": config.d_ff, "gate": config.d_ff}
            up, gate = side_by_side(self, "up_gate", widths, x, config, kernels)
            act = fused.gated if kernels.activation else fused.gated_plain
            inner: Any = act(config.activation, flat(gate), flat(up))
        else:
            up = Dense(config.d_ff, config.init.kernel, config, kernels, name="up")(x)
            act = fused.activation if kernels.activation else fused.activation_plain
            inner = act(config.activation, flat(up))
        inner = site("mlp_inner", inner.reshape(up.shape))
        return Dense(x.shape[-1], config.init.residual, config, kernels, name="down")(inner)


class Adapter(nn.Module):
    """The optional slot behind a sublayer: ``x + up(gelu(down(x)))`` (Houlsby 1902.00751, section 2.1).

    Present when the tree holds it, of the width the tree says.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        weights: Any = self.variables["params"]
        inner = add_bias(einsum("...i,io->...o", x, weights["down"]["kernel"]), weights["down"]["bias"])
        outer = einsum("...i,io->...o", jax.nn.gelu(inner), weights["up"]["kernel"])
        return x + add_bias(outer, weights["up"]["bias"])


def split_heads(x: Float[Array, "B T E"], head_dim: int) -> Float[Array, "B T N H"]:
    """Cut the last axis into heads of ``head_dim``."""
    return rearrange(x, "b t (n h) -> b t n h", h=head_dim)


def merge_heads(x: Float[Array, "B T N H"]) -> Float[Array, "B T E"]:
    """Undo ``split_heads``."""
    return rearrange(x, "b t n h -> b t (n h)")
