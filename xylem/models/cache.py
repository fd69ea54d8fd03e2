"""What a network remembers between calls: keys and values of the tokens it has read.

A cache is an argument and a result of ``apply``, carried through the scan over layers (as scan inputs and outputs it
would be copied whole for every token) and safe to donate. Rows have lengths of their own, so a batch may hold prompts
of unequal length: right-pad them, apply once, and ``rewind`` to the true lengths; what lies beyond a row's length is
never visible and is overwritten by what comes next.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from xylem.models.config import TransformerConfig


class KVCache(struct.PyTreeNode):
    """Keys and values of every layer in one array each; ``lengths[b]`` tokens of row b are valid."""

    key: Float[Array, "L B S K H"] | Any
    value: Float[Array, "L B S K H"] | Any
    lengths: Int[Array, "B"] | Any

    @classmethod
    def init(cls, config: TransformerConfig, batch: int, max_length: int, dtype: str | None = None) -> KVCache:
        """An empty cache for ``max_length`` tokens a row; ``dtype`` defaults to the compute type."""
        shape = (config.num_layers, batch, max_length, config.num_kv_heads, config.head_dim)
        kind = jnp.dtype(dtype or config.compute.dtype)
        return cls(key=jnp.zeros(shape, kind), value=jnp.zeros(shape, kind), lengths=jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.key.shape[2]

    def update(
        self, layer: Int[Array, ""] | int, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
    ) -> tuple[KVCache, Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Write T new tokens of one layer behind each row's length; returns that layer's keys and values, whole.

        Tokens past the capacity are dropped: whoever sizes the cache checks the length beforehand.
        """
        batch, new = key.shape[:2]
        rows = jnp.arange(batch)[:, None]
        slots = self.lengths[:, None] + jnp.arange(new)[None, :]
        cache = self.replace(
            key=self.key.at[layer, rows, slots].set(key.astype(self.key.dtype), mode="drop"),
            value=self.value.at[layer, rows, slots].set(value.astype(self.value.dtype), mode="drop"),
        )
        at = lambda array: jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)  # noqa: E731
        return cache, at(cache.key), at(cache.value)

    def advance(self, tokens: int) -> KVCache:
        """Count the ``tokens`` that every layer has just written."""
        return self.replace(lengths=self.lengths + tokens)

    def rewind(self, lengths: Int[Array, "B"]) -> KVCache:
        """Forget all but the first ``lengths[b]`` tokens of each row."""
        return self.replace(lengths=jnp.minimum(self.lengths, lengths.astype(jnp.int32)))

    def select(self, rows: Int[Array, "C"]) -> KVCache:
        """The cache of rows ``rows``, in that order and as often as named: beams, samples, evicted requests."""
        return KVCache(key=self.key[:, rows], value=self.value[:, rows], lengths=self.lengths[rows])
