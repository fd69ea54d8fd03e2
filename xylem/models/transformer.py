"""The transformer block, and the decoder-only language model built of a stack of them.

The residual stream of a pre-norm block::

    h ──┬─ norm ─ attention ─(+)──┬─ norm ─ mlp ─(+)── h'
        └────────────────────┘    └──────────────┘

How layers are stored, scanned, tapped and intervened in is told in ``stack.py``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from xylem.models import fused
from xylem.models.attention import Attention, Context, CrossAttention
from xylem.models.cache import AttentionCache, KVCache
from xylem.models.config import TransformerConfig
from xylem.models.fused import Choice
from xylem.models.language_model import Head, LanguageModel, Output
from xylem.models.layers import MLP, Adapter, Dense, Embed, Norm
from xylem.models.masks import EVERYONE, Mask
from xylem.models.positions import relative_buckets, rope_tables, segment_positions, sinusoidal
from xylem.models.stack import Sites, layer_runs, scan_layers
from xylem.models.virtual import Text, behind, prefix_length, prepend, prompt_of, stacked_prefix, virtual_length
from xylem.sharding import constrain


class Block(nn.Module):
    """One layer: attention and MLP, each with a norm in front of it or behind, and added to the stream."""

    config: TransformerConfig
    kernels: Choice

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"], context: Context, cache: AttentionCache | None, layer: Any, site: Any):
        config, kernels = self.config, self.kernels
        if config.attention.window is not None:
            # A width that is computed, so that one compiled layer serves both kinds.
            width = jnp.where(layer % 2 == 1, config.attention.window, config.max_length)
            context = context.replace(mask=context.mask.replace(window=width))
        attention = Attention(config, kernels, name="attention")
        x, cache = attention(self._before("attention", h), context, cache, layer)
        h = self._after("attention", h, site("attention_out", x), context)
        if context.memory_mask is not None:
            cross = CrossAttention(config, kernels, name="cross_attention")
            x = cross(self._before("cross_attention", h), context, cache, layer)
            h = self._after("cross_attention", h, site("cross_attention_out", x), context)
        x = MLP(config, kernels, name="mlp")(self._before("mlp", h), site)
        h = self._after("mlp", h, site("mlp_out", x), context)
        return site("block_out", h), cache

    @nn.nowrap
    def _before(self, name: str, h: Array) -> Array:
        """What the sublayer reads."""
        return Norm(self.config, self.kernels, name=f"{name}_norm")(h) if self.config.norm_position == "pre" else h

    @nn.nowrap
    def _after(self, name: str, h: Array, x: Array, context: Context) -> Array:
        """The stream ``h`` with the sublayer's ``x`` added."""
        if self.has_variable("params", f"{name}_adapter"):
            x = Adapter(name=f"{name}_adapter")(x)
        h = constrain(h + nn.Dropout(self.config.dropout, deterministic=not context.train)(x), "batch", None, None)
        return Norm(self.config, self.kernels, name=f"{name}_norm")(h) if self.config.norm_position == "post" else h


def embed_tokens(
    config: TransformerConfig, tokens: Int[Array, "B T"], embeddings: Float[Array, "B T E"] | None
) -> Float[Array, "B T E"]:
    """Rows of the calling module's table ``embed``, or what is given instead."""
    look_up = Embed(config.vocab_size, config.embedding_size, config.init.embedding, config, name="embed")
    return look_up(tokens) if embeddings is None else embeddings.astype(config.compute.dtype)


def add_positions(
    module: nn.Module, config: TransformerConfig, kernels: Choice, text: Text, train: bool = False
) -> Float[Array, "B T D"]:
    """The stream before the first layer from looked-up embeddings, by submodules of the calling ``module``."""
    embedding, width = config.embedding, config.embedding_size
    h, positions, _, token_types = text
    if embedding.scale == "sqrt_d_model":
        h = h * math.sqrt(config.d_model)
    if config.positions.kind == "learned":
        rows = config.positions.offset + config.max_length
        table = Embed(rows, width, config.init.positions, config, name="positions")
        # Rows for every text, equal ones too: XLA:CPU is slow to sum a gradient over the batch, quick to scatter it.
        h = h + table(jnp.broadcast_to(positions + config.positions.offset, h.shape[:2]))
    elif config.positions.kind == "sinusoidal":
        h = h + sinusoidal(positions, width).astype(h.dtype)
    if embedding.token_types:
        types = jnp.zeros(h.shape[:2], jnp.int32) if token_types is None else token_types
        h = h + Embed(embedding.token_types, width, config.init.embedding, config, name="token_types")(types)
    if embedding.norm == "present":
        h = Norm(config, kernels, name="embed_norm")(h)
    h = nn.Dropout(config.dropout, deterministic=not train)(h)
    if embedding.size is not None:
        h = Dense(config.d_model, config.init.kernel, config, kernels, name="embed_projection")(h)
    return constrain(h, "batch", None, None)


def run_layers(
    module: Any,
    config: TransformerConfig,
    kernels: Choice,
    h: Float[Array, "B T D"],
    mask: Mask,
    positions: tuple[Int[Array, "#B T"], Int[Array, "#B S"]],
    cache: Any,
    train: bool,
    memory: Float[Array, "B source D"] | None = None,
    memory_mask: Mask | None = None,
) -> tuple[Float[Array, "B T D"], Any, dict[str, Array]]:
    """All layers of the calling ``module`` and the norm behind them.

    ``positions`` are those of queries and of their keys, counted on behind a prefix where the layers hold one.

    With a ``memory_mask`` each layer also attends to ``memory``, or to what the cache holds of it.

    Returns the final states, the cache and what was tapped.
    """
    where, rope, bias = config.positions, None, None
    held = dict(module.variables.get("params", {}))
    if "prefix" in held:
        raise ValueError("prefix: it is still to be computed from its embeddings (peft.methods.prefix.fold)")
    if cache is None and (front := prefix_length(held)):
        mask, keys = mask.behind(front, h.shape[0]), positions[1]
        before = jnp.broadcast_to(jnp.arange(front, dtype=keys.dtype), (keys.shape[0], front))
        positions = positions[0], jnp.concatenate([before, keys], axis=1)
    if memory_mask is not None and cache is None and (front := prefix_length(held, "cross_attention")):
        memory_mask = memory_mask.behind(front, h.shape[0])
    if where.rope_theta is not None:
        tables = fused.rope_tables if kernels.rope else rope_tables
        rope = tables(positions[0], config.head_dim, where.rope_theta, where.rope_scaling)
    if where.buckets is not None and where.max_distance is not None:
        distances = positions[1][:, None, :] - positions[0][:, :, None]
        buckets = relative_buckets(distances, where.buckets, where.max_distance, config.attention.mask)
        table = Embed(where.buckets, config.num_heads, config.init.positions, config, name="relative_bias")
        bias = rearrange(table(buckets), "b t s n -> b n t s").astype(jnp.float32)
    rng = module.make_rng("dropout") if train and config.dropout > 0.0 else None
    context = Context(mask, rope, bias, rng, memory, memory_mask, train)
    block = Block(config, kernels, parent=None)
    shared = config.num_layers if config.sharing == "all" else None
    stacks = layer_runs(module, block, 1 if shared else config.num_layers, h, context)
    h, cache, kept = scan_layers(
        block,
        stacks,
        h,
        context,
        cache,
        tuple(name for name in module.taps if name != "embed"),
        module.intervene,
        config.compute.remat,
        kernels.unroll,
        shared,
    )
    if config.norm_position == "pre":
        h = Norm(config, kernels, name="final_norm")(h)
    return h, cache, kept


class CausalLM(LanguageModel):
    """A decoder-only language model: GPT and LLaMA are two settings of its config.

    ``params`` hold ``embed``, ``positions`` (learned ones), the runs of ``layers``, ``final_norm`` and, when it is not
    tied to the embedding, ``head``.
    """

    config: TransformerConfig

    SITES: ClassVar = ("embed", "attention_out", "mlp_inner", "mlp_out", "block_out")

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        embeddings: Float[Array, "B T D"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
    ) -> Output:
        """Logits of the next token at every position.

        ``segments`` (0 is padding) keep packed documents apart, and positions then count from each document's start.
        ``embeddings`` replace the look-up of ``tokens``. With a ``cache`` the tokens continue each of its rows; there
        ``segments`` say which are real (1) and which are padding on a row's right (0), which the cache forgets.
        ``train=True`` applies dropout and needs ``rngs={"dropout": key}`` when the rate is above 0.
        """
        config, kernels = self.config, fused.choose(self.config.compute, jax.default_backend())
        # A cache holds the virtual tokens already.
        ahead: dict[str, Any] = {} if cache is not None else dict(self.variables.get("params", {}))
        self.check_call(token_types)
        check_length(config, tokens, virtual_length(ahead, prompt_of(ahead)))
        if positions is None:
            positions = positions_of(tokens, segments, cache)
        text = Text(embed_tokens(config, tokens, embeddings), positions, segments, token_types)
        text = behind(ahead, prepend(prompt_of(ahead), text, EVERYONE))
        door = Sites(jnp.int32(-1), self.taps, self.intervene)
        h = door("embed", add_positions(self, config, kernels, text, train))
        # What a cache holds is one document a row, and padding on its right lies after every real query.
        packed = Mask(query_segments=text.segments, key_segments=text.segments)
        mask = packed if cache is None else Mask(offset=cache.lengths)
        keys = text.positions if cache is None else jnp.arange(cache.capacity)[None]
        hidden, cache, kept = run_layers(self, config, kernels, h, mask, (text.positions, keys), cache, train)
        hidden = hidden[:, h.shape[1] - tokens.shape[1] :]
        if config.head == "untied":
            Head(config, name="head")()
        logits = self.head(dict(self.variables["params"]), hidden)
        if cache is not None:
            cache = cache.advance(tokens.shape[1] if segments is None else (segments > 0).sum(1))
        return Output(logits=logits, hidden=hidden, cache=cache, taps={**door.kept, **kept})

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, params: Any = None) -> KVCache:
        """A cache for ``max_length`` tokens in each of ``batch`` rows: empty, or with the virtual tokens of ``params``
        read already."""
        held: dict[str, Any] = {} if params is None else params
        prompt = prompt_of(held)
        cache = KVCache.init(self.config, batch, max_length + virtual_length(held, prompt))
        if prefix_length(held):
            cache = cache.fill(*stacked_prefix(held, self.config.head_dim))
        if prompt is None:
            return cache
        rows = jnp.broadcast_to(prompt[None], (batch, *prompt.shape))
        tokens = jnp.zeros(rows.shape[:2], jnp.int32)
        out: Any = self.apply({"params": held}, tokens, embeddings=rows, cache=cache)
        return out.cache


def check_length(config: TransformerConfig, tokens: Array, virtual: int = 0) -> None:
    """Raise ValueError for more tokens, ``virtual`` ones in front of them included, than a learned table has rows."""
    if config.positions.kind == "learned" and tokens.shape[1] + virtual > config.max_length:
        what = f"{tokens.shape[1]} tokens" + (f" and {virtual} virtual ones" if virtual else "")
        raise ValueError(f"{what}: the position table has max_length = {config.max_length} rows")


def positions_of(tokens: Array, segments: Array | None, cache: AttentionCache | None = None) -> Int[Array, "#B T"]:
    """Where each token stands in its document, counted from 0."""
    if cache is None and segments is not None:
        return segment_positions(segments)
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    return steps if cache is None else cache.lengths[:, None] + steps
