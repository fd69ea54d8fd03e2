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
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from xylem.models.config import TransformerConfig


class KVCache(struct.PyTreeNode):
    """Keys and values of every layer; ``lengths[b]`` tokens of row b are valid.

    Keys lie with their tokens last and values with theirs before the head's axis, as a new token's two products read
    them: XLA:CPU reads keys of (B, S, K, H) eight times as slowly. All layers are in one array each, or in a tuple of
    one a layer (``apart``), keys then as (B, K, C, H, P), C blocks of P tokens (``in_blocks``).
    """

    key: Float[Array, "L B K H S"] | Any
    value: Float[Array, "L B K S H"] | Any
    lengths: Int[Array, "B"] | Any

    @classmethod
    def init(cls, config: TransformerConfig, batch: int, max_length: int, dtype: str | None = None) -> KVCache:
        """An empty cache for ``max_length`` tokens a row; ``dtype`` defaults to the compute type."""
        kind, first = jnp.dtype(dtype or config.compute.dtype), (config.num_layers, batch, config.num_kv_heads)
        key = jnp.zeros((*first, config.head_dim, max_length), kind)
        value = jnp.zeros((*first, max_length, config.head_dim), kind)
        return cls(key=key, value=value, lengths=jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return jax.tree.leaves(self.value)[0].shape[-2]

    @property
    def is_apart(self) -> bool:
        """Whether there is an array for each layer."""
        return isinstance(self.key, tuple)

    def grow(self, tokens: int) -> KVCache:
        """The same with room for so many more tokens a row: a prompt is read in a cache of its own size."""
        widen = lambda x, after: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), *((0, more) for more in after)])  # noqa: E731
        value = jax.tree.map(lambda x: widen(x, (tokens, 0)), self.value)
        if self.is_apart:
            return self.replace(key=tuple(in_blocks(widen(_joined(x), (0, tokens))) for x in self.key), value=value)
        return self.replace(key=widen(self.key, (0, tokens)), value=value)

    def apart(self) -> KVCache:
        """The same with an array a layer, for layers whose numbers are known: one out of a stack is copied."""
        if self.is_apart:
            return self
        return self.replace(key=tuple(map(in_blocks, self.key)), value=tuple(self.value))

    def update(
        self, layer: Int[Array, ""] | int, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]
    ) -> tuple[KVCache, Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Write T new tokens of one layer behind each row's length; returns that layer's keys and values, whole.

        Tokens past the capacity are dropped: whoever sizes the cache checks the length beforehand.
        """
        batch, new = key.shape[:2]
        rows, every = jnp.arange(batch)[:, None], slice(None)
        slots = self.lengths[:, None] + jnp.arange(new)[None, :]
        size = jax.tree.leaves(self.key)[0].shape[-1]
        tokens = (slots // size, every, slots % size) if self.is_apart else (every, slots)
        keys, own_key = _write(self.key, layer, (rows, every, *tokens), key)
        values, own_value = _write(self.value, layer, (rows, every, slots), value)
        return self.replace(key=keys, value=values), *_by_token(own_key, own_value)

    def fill(self, key: Float[Array, "L P K H"], value: Float[Array, "L P K H"]) -> KVCache:
        """An empty cache with the same P keys and values at the start of every row."""
        count = key.shape[1]
        key, value = rearrange(key, "l p k h -> l 1 k h p"), rearrange(value, "l p k h -> l 1 k p h")
        return self.replace(
            key=self.key.at[..., :count].set(key.astype(self.key.dtype)),
            value=self.value.at[..., :count, :].set(value.astype(self.value.dtype)),
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
        return KVCache(_rows(self.key, rows), _rows(self.value, rows), self.lengths[rows])


class Seq2SeqCache(struct.PyTreeNode):
    """A decoder's own keys and values, and those of the text it reads, which never change.

    Attributes:
        own: of the decoder's tokens.
        memory_key, memory_value: of the encoder's final states, by layer.
        segments: which of these are real (not 0).
    """

    own: KVCache
    memory_key: Float[Array, "L B K H S"] | Any
    memory_value: Float[Array, "L B K S H"] | Any
    segments: Int[Array, "B S"] | Any

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Tokens of each row that the decoder has read or written."""
        return self.own.lengths

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.own.capacity

    @property
    def is_apart(self) -> bool:
        """As ``KVCache.is_apart``."""
        return self.own.is_apart

    def memory(self, layer: Int[Array, ""] | int) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of the other text for one layer."""
        return _by_token(_at(self.memory_key, layer), _at(self.memory_value, layer))

    def grow(self, tokens: int) -> Seq2SeqCache:
        """The same with room for so many more of the decoder's tokens a row."""
        return self.replace(own=self.own.grow(tokens))

    def apart(self) -> Seq2SeqCache:
        """As ``KVCache.apart``, of both."""
        if self.is_apart:
            return self
        key, value = tuple(map(in_blocks, self.memory_key)), tuple(self.memory_value)
        return self.replace(own=self.own.apart(), memory_key=key, memory_value=value)

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
        key, value = _rows(self.memory_key, rows), _rows(self.memory_value, rows)
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

    def grow(self, tokens: int) -> StateCache:
        """The same: a state has room for any number of tokens."""
        return self

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

    def grow(self, tokens: int) -> TokenCache:
        """The same with room for so many more tokens a row."""
        return self.replace(tokens=jnp.pad(self.tokens, [(0, 0), (0, tokens)]))

    def advance(self, tokens: Int[Array, "B"] | int) -> TokenCache:
        """Count the ``tokens`` that have just been written, of all rows or of each."""
        return self.replace(lengths=self.lengths + tokens)

    def rewind(self, lengths: Int[Array, "B"]) -> TokenCache:
        """Forget all but the first ``lengths[b]`` tokens of each row."""
        return self.replace(lengths=jnp.minimum(self.lengths, lengths.astype(jnp.int32)))

    def select(self, rows: Int[Array, "C"]) -> TokenCache:
        """The cache of rows ``rows``, in that order and as often as named."""
        return TokenCache(self.tokens[rows], self.lengths[rows])


def grown(cache: Any, tokens: int) -> Any:
    """A cache, or caches, with room for so many more tokens a row."""
    kinds = (KVCache, Seq2SeqCache, StateCache, TokenCache)
    return jax.tree.map(lambda x: x.grow(tokens), cache, is_leaf=lambda x: isinstance(x, kinds))


Held = Array | tuple[Array, ...]  # of all layers: stacked, or one each


def _at(held: Held, layer: Int[Array, ""] | int) -> Array:
    """What one layer holds."""
    return held[layer] if isinstance(held, tuple) else jax.lax.dynamic_index_in_dim(held, layer, 0, keepdims=False)


def _write(held: Held, layer: Int[Array, ""] | int, index: tuple[Any, ...], new: Array) -> tuple[Held, Array]:
    """Put ``new`` at ``index`` of what one layer holds; also returns that."""
    if isinstance(held, tuple):
        own = held[layer].at[index].set(new.astype(held[layer].dtype), mode="drop")
        return (*held[:layer], own, *held[layer + 1 :]), own
    held = held.at[(layer, *index)].set(new.astype(held.dtype), mode="drop")
    return held, _at(held, layer)


def _rows(held: Held, rows: Int[Array, "C"]) -> Held:
    """Of every layer the rows ``rows``."""
    return tuple(x[rows] for x in held) if isinstance(held, tuple) else held[:, rows]


KEY_BLOCK = 32


def in_blocks(key: Float[Array, "*L B K H S"]) -> Float[Array, "*L B K C H P"]:
    """Keys by blocks of ``KEY_BLOCK`` tokens, or in one block where they are no multiple of that.

    XLA:CPU multiplies few queries by 32 or 64 keys at the speed of memory, by more at half of it: 160 keys of 64 for
    two queries, 6 heads and 32 rows take 805 us in one block and 428 in five (two Zen 4 threads, jaxlib 0.10.2).
    """
    size = KEY_BLOCK if key.shape[-1] % KEY_BLOCK == 0 else key.shape[-1]
    return rearrange(key, "... h (c p) -> ... c h p", p=size)


def _joined(key: Float[Array, "*L B K C H P"]) -> Float[Array, "*L B K H S"]:
    """Undo ``in_blocks``."""
    return rearrange(key, "... c h p -> ... h (c p)")


def _by_token(
    key: Float[Array, "B K H S"] | Float[Array, "B K C H P"], value: Float[Array, "B K S H"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """A layer's keys and values in the order in which attention is written.

    In one step each: XLA then sees that ``fused_attention.scores`` undoes it, and moves nothing.
    """
    order = "b k c h p -> b (c p) k h" if key.ndim == 5 else "b k h s -> b s k h"
    return rearrange(key, order), rearrange(value, "b k s h -> b s k h")


AttentionCache = KVCache | Seq2SeqCache  # what attention layers are given


def _beside(rows: Array, x: Array) -> Array:
    """``rows`` with an axis of size 1 for each further one that ``x`` has."""
    return rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))
