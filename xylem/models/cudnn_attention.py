"""Attention by cuDNN's flash kernels on NVIDIA GPUs, through jax: ``attention.attend`` is its plain twin.

They take bfloat16 alone. A mask that is no more than causal, with or without a window, costs nothing and skips what it
hides; any other is read as an array (B, 1, T, S).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xylem.models.masks import Mask
from xylem.sharding import by_parts

IMPLEMENTATION = "cudnn"  # of jax.nn.dot_product_attention


def nvidia_generation() -> int:
    """The first number of the GPU's compute capability: 8 is Ampere; 0 where there is no NVIDIA GPU."""
    first = getattr(jax.devices()[0], "compute_capability", "").partition(".")[0]
    return int(first) if first.isdigit() else 0


def takes(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], bias: Array | None) -> bool:
    """Whether there are kernels for these, both ways: since Ampere (8.0), for no AMD GPU, nor for odd lengths."""
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128 and query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return nvidia_generation() >= 8 and query.dtype == jnp.bfloat16 and fits and bias is None


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    scale: float,
) -> Float[Array, "B T N H"]:
    """``attention.attend`` without bias and dropout, of what the kernel ``takes``."""
    in_order = mask.causal and mask.offset is None and mask.prefix is None
    window = mask.window if in_order and isinstance(mask.window, int) else None
    rest = mask.replace(causal=mask.causal and not in_order, window=mask.window if window is None else None)
    allowed: Bool[Array, "#B 1 T S"] | None = None
    if rest.causal or rest.window is not None or rest.query_segments is not None:
        allowed = mask.array(query.shape[1], key.shape[1])[:, None]

    def kernel(query: Array, key: Array, value: Array, *allowed: Array) -> tuple[Array]:
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=allowed[0] if allowed else None,
            scale=scale,
            is_causal=in_order,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=IMPLEMENTATION,
        )
        return (out,)

    # A mesh may divide queries' heads and not keys', which jax's own rule for the kernels refuses.
    inputs: list[tuple[str | None, ...]] = [("batch", None, "tensor", None)] * 3
    seen = [] if allowed is None else [allowed]
    inputs += [(None if len(each) == 1 else "batch", None, None, None) for each in seen]
    (out,) = by_parts(kernel, inputs, inputs[:1])(query, key, value, *seen)
    if allowed is None:
        return out
    # Where a query may see nothing the kernel gives the mean of all values.
    return jnp.where(allowed[:, 0].any(-1)[..., None, None], out, 0)
