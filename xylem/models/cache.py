"""What a network remembers between calls: keys and values of the tokens it has read, or the state they left.

A cache is an argument and a result of ``apply``, carried through the scan over layers (as scan inputs and outputs it
would be copied whole for every token) and safe to donate. Rows have lengths of their own, so a batch may hold prompts
of unequal length: pad them on the right and say in ``segments`` which tokens are real; a row forgets its padding.

One protocol: ``lengths`` (tokens of each row), a layer's own ``update``, then ``advance`` once a call; between calls
``select`` (beams, samples, evicted requests) and ``rewind`` (rejected drafts).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

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

    def fill(self, key: Float[Array, "L P K H"], value: Float[Array, "L P K H"]) -> KVCache:
        """An empty cache with the same P keys and values at the start of every row."""
        count = key.shape[1]
        return self.replace(
            key=self.key.at[:, :, :count].set(key[:, None].astype(self.key.dtype)),
            value=self.value.at[:, :, :count].set(value[:, None].astype(self.value.dtype)),
            lengths=jnp.full_like(self.lengths, count),
        )

    def advance(self, tokens: Int[Array, "B"] | int) -> KVCache:
        """Count the ``tokens`` that every layer has just written, of all rows or of each."""
        return self.replace(lengths=self.lengths + tokens)

    def rewind(self, lengths: Int[Array, "B"]) -> KVCache:
        """Forget all but the first ``lengths[b]`` tokens of each row."""
        return self.replace(lengths=jnp.minimum(self.lengths, lengths.astype(jnp.int32)))

    def select(self, rows: Int[Array, "C"]) -> KVCache:
        """The cache of rows ``rows``, in that order and as often as named."""
        return KVCache(key=self.key[:, rows], value=self.value[:, rows], lengths=self.lengths[rows])


class Seq2SeqCache(struct.PyTreeNode):
    """A decoder's own keys and values, and those of the text it reads, which never change.

    Attributes:
        own: of the decoder's tokens.
        memory_key, memory_value: of the encoder's final states, by layer.
        segments: which of these are real (not 0).
    """

    own: KVCache
    memory_key: Float[Array, "L B S K H"] | Any
    memory_value: Float[Array, "L B S K H"] | Any
    segments: Int[Array, "B S"] | Any

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Tokens of each row that the decoder has read or written."""
        return self.own.lengths

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.own.capacity

    def memory(self, layer: Int[Array, ""] | int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of the other text for one layer."""
        at = lambda array: jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)  # noqa: E731
        return at(self.memory_key), at(self.memory_value)

    def update(
        self, layer: Int[Array, ""] | int, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
    ) -> tuple[Seq2SeqCache, Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """As ``KVCache.update``, of the decoder's own tokens."""
        own, key, value = self.own.update(layer, key, value)
        return self.replace(own=own), key, value

    def advance(self, tokens: Int[Array, "B"] | int) -> Seq2SeqCache:
        """Count the ``tokens`` that every layer has just written, of all rows or of each."""
        return self.replace(own=self.own.advance(tokens))

    def rewind(self, lengths: Int[Array, "B"]) -> Seq2SeqCache:
        """Forget all but the first ``lengths[b]`` tokens of each row."""
        return self.replace(own=self.own.rewind(lengths))

    def select(self, rows: Int[Array, "C"]) -> Seq2SeqCache:
        """The cache of rows ``rows``, in that order and as often as named."""
        key, value = self.memory_key[:, rows], self.memory_value[:, rows]
        return Seq2SeqCache(self.own.select(rows), key, value, self.segments[rows])


class StateCache(struct.PyTreeNode):
    """What recurrent layers carry from token to token, after the last token of each row and after some before it.

    Attributes:
        states: a tree of arrays (L, P, B, ...); place p of the second axis is the state p tokens ago.
        lengths: tokens each row has read.
    """

    states: Any
    lengths: Int[Array, "B"] | Any

    @classmethod
    def init(cls, state: Any, num_layers: int, batch: int, history: int = 0) -> StateCache:
        """Zero states. ``state`` is a tree of ``jax.ShapeDtypeStruct`` of one layer and one row; ``history`` is how
        many tokens ``rewind`` may go back."""
        zeros = lambda leaf: jnp.zeros((num_layers, history + 1, batch, *leaf.shape), leaf.dtype)  # noqa: E731
        return cls(states=jax.tree.map(zeros, state), lengths=jnp.zeros(batch, jnp.int32))

    @property
    def history(self) -> int:
        """How many tokens ``rewind`` may go back."""
        return jax.tree.leaves(self.states)[0].shape[1] - 1

    def read(self, layer: Int[Array, ""] | int) -> Any:
        """The state of one layer: a tree of arrays (B, ...)."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)[0], self.states)

    def update(self, layer: Int[Array, ""] | int, trail: Any, padded: Bool[Array, "B"] | None = None) -> StateCache:
        """Write the states of one layer after its newest tokens, the last token's first: a tree of arrays (p, B, ...).

        ``p`` is at most ``history + 1``; fewer push the older ones back. Rows marked ``padded`` had padding among these
        tokens: the newest state is right, how many tokens ago the others were is not known, and they become NaN.
        """

        def write(old, new):
            kept = jax.lax.dynamic_index_in_dim(old, layer, 0, keepdims=False)
            places = jnp.concatenate([new.astype(old.dtype), kept], axis=0)[: old.shape[1]]
            if padded is not None:
                lost = padded[None, :] & (jnp.arange(old.shape[1]) > 0)[:, None]
                places = jnp.where(_beside(lost, places), jnp.nan, places)
            return jax.lax.dynamic_update_index_in_dim(old, places, layer, 0)

        return self.replace(states=jax.tree.map(write, self.states, trail))

    def advance(self, tokens: Int[Array, "B"] | int) -> StateCache:
        """Count the ``tokens`` that every layer has just read, of all rows or of each."""
        return self.replace(lengths=self.lengths + tokens)

    def rewind(self, lengths: Int[Array, "B"]) -> StateCache:
        """Forget all but the first ``lengths[b]`` tokens of each row.

        A row asked to go back to 0 is as it was at first. One asked to go back further than ``history`` otherwise gets
        NaN as its state: what was not kept cannot be used unseen.
        """
        back = jnp.maximum(self.lengths - lengths.astype(jnp.int32), 0)

        def move(x):
            places = (jnp.arange(x.shape[1])[:, None] + back[None, :])[None]
            moved = jnp.take_along_axis(x, _beside(jnp.minimum(places, x.shape[1] - 1), x), axis=1)
            moved = jnp.where(_beside(places < x.shape[1], x), moved, jnp.nan)
            return jnp.where(_beside((lengths <= 0)[None, None, :], x), 0.0, moved)

        return self.replace(states=jax.tree.map(move, self.states), lengths=self.lengths - back)

    def select(self, rows: Int[Array, "C"]) -> StateCache:
        """The cache of rows ``rows``, in that order and as often as named."""
        return StateCache(jax.tree.map(lambda x: x[:, :, rows], self.states), self.lengths[rows])


class TokenCache(struct.PyTreeNode):
    """The tokens themselves, for a network that reads the last of them anew; ``lengths[b]`` of row b are valid."""

    tokens: Int[Array, "B S"] | Any
    lengths: Int[Array, "B"] | Any

    @classmethod
    def init(cls, batch: int, max_length: int) -> TokenCache:
        """An empty cache for ``max_length`` tokens a row."""
        return cls(tokens=jnp.zeros((batch, max_length), jnp.int32), lengths=jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.tokens.shape[1]

    def update(self, tokens: Int[Array, "B T"]) -> TokenCache:
        """Write T new tokens behind each row's length; those past the capacity are dropped."""
        slots = self.lengths[:, None] + jnp.arange(tokens.shape[1])[None, :]
        rows = jnp.arange(tokens.shape[0])[:, None]
        return self.replace(tokens=self.tokens.at[rows, slots].set(tokens.astype(jnp.int32), mode="drop"))

    def advance(self, tokens: Int[Array, "B"] | int) -> TokenCache:
        """Count the ``tokens`` that have just been written, of all rows or of each."""
        return self.replace(lengths=self.lengths + tokens)

    def rewind(self, lengths: Int[Array, "B"]) -> TokenCache:
        """Forget all but the first ``lengths[b]`` tokens of each row."""
        return self.replace(lengths=jnp.minimum(self.lengths, lengths.astype(jnp.int32)))

    def select(self, rows: Int[Array, "C"]) -> TokenCache:
        """The cache of rows ``rows``, in that order and as often as named."""
        return TokenCache(self.tokens[rows], self.lengths[rows])


AttentionCache = KVCache | Seq2SeqCache  # what attention layers are given


def _beside(rows: Array, x: Array) -> Array:
    """``rows`` with an axis of size 1 for each further one that ``x`` has."""
    return rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))
