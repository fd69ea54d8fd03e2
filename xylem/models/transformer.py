"""The transformer block, and the decoder-only language model built of a stack of them.

The residual stream of a pre-norm block::

    h ──┬─ norm ─ attention ─(+)──┬─ norm ─ mlp ─(+)── h'
        └────────────────────┘    └──────────────┘

How layers are stored, scanned, tapped and intervened in is told in ``stack.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.models import fused
from xylem.models.attention import Attention
from xylem.models.cache import KVCache
from xylem.models.config import TransformerConfig
from xylem.models.fused import Choice
from xylem.models.language_model import Head, LanguageModel, Output
from xylem.models.layers import MLP, Adapter, Embed, Norm
from xylem.models.masks import Mask
from xylem.models.positions import rope_tables, segment_positions, sinusoidal
from xylem.models.stack import Sites, layer_runs, scan_layers
from xylem.sharding import constrain


class Context(struct.PyTreeNode):
    """What every layer of one call shares."""

    mask: Mask
    rope: tuple[Array, Array] | None
    rng: PRNGKeyArray | None
    train: bool = struct.field(pytree_node=False)


class Block(nn.Module):
    """One pre-norm layer: attention and MLP, each behind a norm and added to the stream."""

    config: TransformerConfig
    kernels: Choice

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"], context: Context, cache: KVCache | None, layer: Any, site: Any):
        config, kernels = self.config, self.kernels
        drop = nn.Dropout(config.dropout, deterministic=not context.train)
        x = Norm(config, kernels, name="attention_norm")(h)
        attention = Attention(config, kernels, name="attention")
        x, cache = attention(x, context.mask, context.rope, cache, layer, context.train)
        h = constrain(h + drop(self._slot("attention_adapter", site("attention_out", x))), "batch", None, None)
        x = Norm(config, kernels, name="mlp_norm")(h)
        x = site("mlp_out", MLP(config, kernels, name="mlp")(x, site))
        h = constrain(h + drop(self._slot("mlp_adapter", x)), "batch", None, None)
        return site("block_out", h), cache

    def _slot(self, name: str, x: Array) -> Array:
        return Adapter(name=name)(x) if self.has_variable("params", name) else x


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
        self._check(tokens, token_types)
        embed = Embed(config.vocab_size, config.init.embedding, config, name="embed")
        h = embed(tokens) if embeddings is None else embeddings.astype(config.compute.dtype)
        if positions is None:
            positions = _positions(tokens, segments, cache)
        if config.positions == "learned":
            h = h + Embed(config.max_length, config.init.positions, config, name="positions")(positions)
        elif config.positions == "sinusoidal":
            h = h + sinusoidal(positions, config.d_model).astype(h.dtype)
        h = constrain(nn.Dropout(config.dropout, deterministic=not train)(h), "batch", None, None)
        door = Sites(jnp.int32(-1), self.taps, self.intervene)
        h = door("embed", h)

        rope = None
        if config.rope_theta is not None:
            tables = fused.rope_tables if kernels.rope else rope_tables
            rope = tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        # What a cache holds is one document a row, and padding on its right lies after every real query.
        packed = Mask(query_segments=segments, key_segments=segments)
        context = Context(
            mask=packed if cache is None else Mask(offset=cache.lengths),
            rope=rope,
            rng=self.make_rng("dropout") if train and config.dropout > 0.0 else None,
            train=train,
        )
        block = Block(config, kernels, parent=None)
        stacks = layer_runs(self, block, config.num_layers, h, context)
        layer_taps = tuple(name for name in self.taps if name != "embed")
        remat, unroll = config.compute.remat, kernels.unroll
        h, cache, kept = scan_layers(block, stacks, h, context, cache, layer_taps, self.intervene, remat, unroll)
        hidden = Norm(config, kernels, name="final_norm")(h)
        if config.head == "untied":
            Head(config, name="head")()
        logits = self.head(dict(self.variables["params"]), hidden)
        if cache is not None:
            cache = cache.advance(tokens.shape[1] if segments is None else (segments > 0).sum(1))
        return Output(logits=logits, hidden=hidden, cache=cache, taps={**door.kept, **kept})

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for ``max_length`` tokens in each of ``batch`` rows."""
        return KVCache.init(self.config, batch, max_length)

    @nn.nowrap
    def _check(self, tokens: Array, token_types: Array | None) -> None:
        self.check_call(token_types)
        config = self.config
        if config.positions == "learned" and tokens.shape[1] > config.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens: the position table has max_length = {config.max_length} rows")


def _positions(tokens: Array, segments: Array | None, cache: KVCache | None) -> Int[Array, "#B T"]:
    """Where each token stands in its document, counted from 0."""
    if cache is None and segments is not None:
        return segment_positions(segments)
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    return steps if cache is None else cache.lengths[:, None] + steps
