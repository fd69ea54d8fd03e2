"""Where a token stands: positions within a document, sinusoids, rotary embeddings, and buckets of distances.

Learned positions are an ``Embed`` table (see ``transformer.py``); everything here is a formula.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xylem.models.config import RopeScaling


def segment_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token within its own run of equal segment ids, so a packed document counts from 0."""
    rows = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return rows - jax.lax.cummax(jnp.where(starts, rows, 0), axis=1)


def sinusoidal(positions: Int[Array, "#B T"], d_model: int) -> Float[Array, "#B T D"]:
    """Sines in the even columns, cosines in the odd ones (1706.03762, section 3.5)."""
    columns = jnp.arange(d_model)
    rates = 10_000.0 ** (-(2 * (columns // 2)) / d_model)
    angles = positions[..., None] * rates[None, None, :]
    return jnp.where(columns % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, "h"]:
    """Radians a position for each rotated pair (RoFormer 2104.09864, section 3.2.2).

    With ``scaling`` (LLaMA 3.1), wavelengths longer than ``original_max_length / low_frequency_factor`` are stretched
    by ``factor``, those shorter than ``original_max_length / high_frequency_factor`` kept, and those between blended.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_length * frequencies / (2 * jnp.pi)  # full rotations over the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rope_tables(
    positions: Int[Array, "#B T"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float[Array, "#B T h"], Float[Array, "#B T h"]]:
    """Cosines and sines of every position's rotation, in float32: bfloat16 cannot tell 256 from 257."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(head_dim, theta, scaling)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], tables: tuple[Float[Array, "#B T h"], Float[Array, "#B T h"]]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of every head by its position's angles.

    This is the half-split pairing of Hugging Face's checkpoints; Meta's and GGUF's pair neighbours (2i, 2i + 1), which
    is the same network with the rows of the query and key kernels reordered.
    """
    cosines, sines = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return rotated.astype(x.dtype)


def relative_buckets(
    distances: Int[Array, "*B T S"], buckets: int, max_distance: int, mask: Literal["causal", "bidirectional"]
) -> Int[Array, "*B T S"]:
    """Bucket of each distance ``key position - query position`` (T5 1910.10683, section 2.1).

    Half of the buckets hold one distance each, the other half distances up to ``max_distance`` in logarithmic steps,
    and the last of them all beyond. Where keys may also lie ahead, each direction has half of the buckets.
    """
    ahead = 0
    if mask == "bidirectional":
        buckets //= 2
        ahead = (distances > 0).astype(jnp.int32) * buckets
        distances = -jnp.abs(distances)
    back = jnp.maximum(-distances, 0)
    exact = buckets // 2
    steps = jnp.log(jnp.maximum(back, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (steps * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return ahead + jnp.where(back < exact, back, far)
