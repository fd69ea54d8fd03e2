"""Attention: a readable reference, the fast paths that equal it, and the layer that owns the four projections."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.models import cudnn_attention, fused_attention
from xylem.models.cache import KEY_BLOCK, AttentionCache, Seq2SeqCache
from xylem.models.config import TransformerConfig
from xylem.models.fused import Choice
from xylem.models.layers import Dense, merge_heads, side_by_side, split_heads
from xylem.models.masks import Mask
from xylem.models.positions import rotate
from xylem.models.virtual import join_prefix


class Context(struct.PyTreeNode):
    """What every layer of one call shares.

    Attributes:
        bias: added to the scores of every head.
        memory: what an encoder made of another text, for layers that also attend to that; ``memory_mask`` says who may.
    """

    mask: Mask
    rope: tuple[Array, Array] | None
    bias: Float[Array, "#B N T S"] | None
    rng: PRNGKeyArray | None
    memory: Float[Array, "B source D"] | None = None
    memory_mask: Mask | None = None
    train: bool = struct.field(pytree_node=False, default=False)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float | None = None,
    bias: Float[Array, "#B N T S"] | None = None,
    dropout: float = 0.0,
    rng: PRNGKeyArray | None = None,
    key_block: int | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped heads: the definition every fast path is held against.

    ``softmax(scale * query @ key + bias) @ value`` over the keys the mask allows, ``scale`` being ``1 / sqrt(H)`` where
    none is given (1706.03762, section 3.2.1); query head n reads key/value head ``n // (N/K)`` (GQA 2305.13245). A
    query that may see nothing gets zeros. ``dropout`` drops attention weights; it needs ``rng``. ``key_block`` says
    that the keys are held in blocks of so many, a matter of speed alone (``cache.in_blocks``).
    """
    queries, heads, head_dim = query.shape[1:]
    groups = heads // key.shape[2]
    query = rearrange(query, "b t (k g) h -> b k g t h", g=groups)
    product = fused_attention.scores_plain if key_block is None else partial(fused_attention.scores, block=key_block)
    scores = product(query, key)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + rearrange(bias, "b (k g) t s -> b k g t s", g=groups)
    allowed = mask.array(queries, key.shape[1])[:, None, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    if rng is not None and dropout > 0.0:
        keep = jax.random.bernoulli(rng, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    out = jnp.einsum("bkgts,bskh->bkgth", weights.astype(value.dtype), value)
    return rearrange(out, "b k g t h -> b t (k g) h").astype(query.dtype)  # a cache may hold wider values


class Attention(nn.Module):
    """Multi-head self-attention with grouped key/value heads; it knows no family, only what its config says."""

    config: TransformerConfig
    kernels: Choice

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        cache: AttentionCache | None,
        layer: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None]:
        """Returns the output projection and the cache with this layer's keys and values written into it."""
        config, kernels = self.config, self.kernels
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        widths = {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
        projected = side_by_side(self, "query_key_value", widths, x, config, kernels)
        query, key, value = (split_heads(each, head_dim) for each in projected)
        if context.rope is not None:
            query, key = rotate(query, context.rope), rotate(key, context.rope)
        if cache is not None:
            cache, key, value = cache.update(layer, key, value)
        elif self.has_variable("params", "prefix"):
            key, value = join_prefix(self.variables["params"]["prefix"], key, value)
        rng = self.make_rng("dropout") if context.train and config.dropout > 0.0 else None
        out = weigh(query, key, value, context.mask, config, kernels, context.bias, rng, cache)
        out = Dense(x.shape[-1], config.init.residual, config, kernels, name="output")(merge_heads(out))
        return out, cache


class CrossAttention(nn.Module):
    """Multi-head attention from one text to what an encoder made of another (1706.03762, section 3.2.3)."""

    config: TransformerConfig
    kernels: Choice

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        cache: AttentionCache | None,
        layer: Int[Array, ""] | int,
    ) -> Float[Array, "B T D"]:
        """The output projection. With a cache the memory's keys and values are those it holds, else made here."""
        config, kernels, memory, mask = self.config, self.kernels, context.memory, context.memory_mask
        assert mask is not None
        widths = {"key": config.num_kv_heads * config.head_dim, "value": config.num_kv_heads * config.head_dim}
        query = Dense(config.num_heads * config.head_dim, config.init.kernel, config, kernels, name="query")(x)
        if not isinstance(cache, Seq2SeqCache):
            assert memory is not None, "a cache that holds the memory's keys and values (Seq2Seq.start), or the memory"
            key, value = (
                Dense(width, config.init.kernel, config, kernels, name=name)(memory) for name, width in widths.items()
            )
            key, value = split_heads(key, config.head_dim), split_heads(value, config.head_dim)
            if self.has_variable("params", "prefix"):
                key, value = join_prefix(self.variables["params"]["prefix"], key, value)
        else:
            key, value = cache.memory(layer)
        rng = self.make_rng("dropout") if context.train and config.dropout > 0.0 else None
        query = split_heads(query, config.head_dim)
        out = weigh(query, key, value, mask, config, kernels, None, rng, cache)
        return Dense(x.shape[-1], config.init.residual, config, kernels, name="output")(merge_heads(out))


FEW_QUERIES = 8  # tokens read at once by blocks of keys; more would be written out for each block


def weigh(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    config: TransformerConfig,
    kernels: Choice,
    bias: Float[Array, "#B N T S"] | None,
    rng: PRNGKeyArray | None,
    cache: AttentionCache | None,
) -> Float[Array, "B T N H"]:
    """``attend`` as the config says, by a fast path where there is one that can do it; ``rng`` drops weights.

    Keys and values may be those of a ``cache``.
    """
    scale = config.head_dim**-0.5 if config.attention.scale == "head_dim" else 1.0
    if rng is None and cache is None:
        if kernels.attention == "chunked":
            return fused_attention.attention(query, key, value, mask, scale, kernels.attention_chunk, bias)
        if kernels.attention == "cudnn" and cudnn_attention.takes(query, key, bias):
            return cudnn_attention.attention(query, key, value, mask, scale)
    blocks = cache is not None and cache.is_apart and query.shape[1] <= FEW_QUERIES and key.shape[1] % KEY_BLOCK == 0
    block = KEY_BLOCK if blocks else None
    return attend(query, key, value, mask, scale=scale, bias=bias, dropout=config.dropout, rng=rng, key_block=block)
