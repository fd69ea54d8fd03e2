"""Encoder-decoders: the 2017 Transformer, BART and T5 are settings of one config.

The encoder reads a text in both directions; every layer of the decoder attends to what has been written so far and then
to the encoder's final states (1706.03762, figure 1). One embedding table serves both sides and, where tied, the head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from xylem.models import fused
from xylem.models.cache import KVCache, Seq2SeqCache
from xylem.models.config import Seq2SeqConfig, TransformerConfig
from xylem.models.language_model import Head, LanguageModel, Output
from xylem.models.layers import Embed, add_bias, einsum, split_heads
from xylem.models.leaves import bias_of
from xylem.models.masks import Mask
from xylem.models.stack import Intervention, Sites, runs
from xylem.models.transformer import add_positions, check_length, positions_of, run_layers
from xylem.models.virtual import Text, behind, lengthened, prefix_length, prepend, prompt_of, stacked_prefix


class Seq2Seq(LanguageModel):
    """An encoder-decoder language model.

    ``params`` hold ``embed``, ``encoder`` and ``decoder`` (each with its positions, norms and runs of ``layers``) and,
    when it is not tied to the embedding, ``head``. Taps and interventions are the decoder's; ``encode`` has none.
    """

    config: Seq2SeqConfig

    SITES: ClassVar = ("embed", "attention_out", "cross_attention_out", "mlp_inner", "mlp_out", "block_out")

    def setup(self):
        config = self.config
        self.embed = Embed(config.vocab_size, config.d_model, config.init.embedding, config.decoder)
        self.encoder = Side(config.encoder)
        self.decoder = Side(config.decoder, self.taps, self.intervene)
        if config.head == "untied":
            self.output = Head(config, name="head")

    def __call__(
        self,
        tokens: Int[Array, "B S"] | None,
        decoder_tokens: Int[Array, "B T"] | None = None,
        *,
        segments: Int[Array, "B S"] | None = None,
        decoder_segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        token_types: None = None,
        embeddings: Float[Array, "B S D"] | None = None,
        cache: Seq2SeqCache | None = None,
        train: bool = False,
    ) -> Output:
        """Logits of the token behind each of ``decoder_tokens`` (those of ``tokens`` where none are given).

        ``segments`` and ``decoder_segments`` (0 is padding) keep packed pairs apart: a target sees the source of the
        same id. ``embeddings`` replace the look-up of ``tokens``. With a ``cache`` (``start``) the decoder's tokens
        continue each row, and ``tokens`` may be None.
        """
        self.check_call(token_types)
        decoder_tokens = tokens if decoder_tokens is None else decoder_tokens
        if decoder_tokens is None:
            raise ValueError("tokens and decoder_tokens are both missing")
        if cache is not None:
            memory, sources, targets = None, cache.segments, jnp.ones_like(decoder_tokens)
        elif tokens is not None:
            memory = self.encode(tokens, segments=segments, embeddings=embeddings, train=train)
            sources, targets = segments, decoder_segments
            if sources is not None and targets is None:  # one pair a row, its source perhaps padded
                targets = jnp.ones_like(decoder_tokens)
        else:
            raise ValueError("tokens are missing, and so is a cache that holds what was made of them (start)")
        if cache is None:
            sources = lengthened(self._prompt(), sources, None)
        memory_mask = Mask(causal=False, query_segments=targets, key_segments=sources)
        if positions is None:
            positions = positions_of(decoder_tokens, decoder_segments, cache)
        h = self.embed(decoder_tokens)
        text = Text(h, positions, decoder_segments, None)
        hidden, cache, taps = self.decoder(text, cache, train, memory, memory_mask)
        if self.config.head == "untied":
            self.output()
        logits = self.head(dict(self.variables["params"]), hidden)
        if cache is not None:
            new = decoder_tokens.shape[1] if decoder_segments is None else (decoder_segments > 0).sum(1)
            cache = cache.advance(new)
        return Output(logits=logits, hidden=hidden, cache=cache, taps=taps)

    def encode(
        self,
        tokens: Int[Array, "B S"],
        *,
        segments: Int[Array, "B S"] | None = None,
        embeddings: Float[Array, "B S D"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B source D"]:
        """The encoder's final states: of the virtual tokens, where there are some, and of ``tokens``."""
        h = self.embed(tokens) if embeddings is None else embeddings.astype(self.config.compute.dtype)
        text = Text(h, positions_of(tokens, segments), segments, None)
        return self.encoder(prepend(self._prompt(), text, None), None, train)[0]

    @nn.nowrap
    def _prompt(self) -> Float[Array, "P D"] | None:
        """The virtual tokens that the encoder reads in front of every source."""
        return prompt_of(dict(self.variables.get("params", {})))

    @nn.nowrap
    def start(
        self, params: dict[str, Any], tokens: Int[Array, "B S"], max_length: int, segments: Int[Array, "B S"] | None
    ) -> Seq2SeqCache:
        """Read the source texts, one a row (``segments`` 0 is padding).

        Returns a cache of their keys and values for every decoder layer, with room for ``max_length`` target tokens.
        """
        config = self.config.decoder
        memory: Any = self.apply({"params": params}, tokens, segments=segments, method="encode")

        def remember(layer: dict[str, Any]) -> tuple[Array, Array]:
            made = []
            for name in ("key", "value"):
                part = layer["cross_attention"][name]
                y = einsum("...i,io->...o", memory, part["kernel"])
                y = add_bias(y, bias_of(part["kernel"], part["bias"])) if "bias" in part else y
                made.append(split_heads(y, config.head_dim))
            return made[0], made[1]

        decoder, batch = params["decoder"], tokens.shape[0]
        pairs = [jax.vmap(remember)(decoder[name]) for name in runs(decoder)]
        keys, values = (jnp.concatenate(each) for each in zip(*pairs, strict=True))
        real: Any = jnp.ones_like(tokens) if segments is None else (segments > 0).astype(tokens.dtype)
        real = lengthened(prompt_of(params), real, 1)
        if front := prefix_length(decoder, "cross_attention"):
            first = stacked_prefix(decoder, config.head_dim, "cross_attention")
            spread = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], batch, *x.shape[1:]))  # noqa: E731
            keys, values = (
                jnp.concatenate([spread(x), own], axis=2) for x, own in zip(first, (keys, values), strict=True)
            )
            real = jnp.pad(real, [(0, 0), (front, 0)], constant_values=1)
        front = prefix_length(decoder)
        own = KVCache.init(config, batch, max_length + front)
        own = own.fill(*stacked_prefix(decoder, config.head_dim)) if front else own
        keys, values = rearrange(keys, "l b s k h -> l b k h s"), rearrange(values, "l b s k h -> l b k s h")
        return Seq2SeqCache(own, keys, values, real)


class Side(nn.Module):
    """One of the two stacks: positions, layers, norm."""

    config: TransformerConfig
    taps: tuple[str, ...] = ()
    intervene: Intervention | None = None

    @nn.compact
    def __call__(
        self,
        text: Text,
        cache: Seq2SeqCache | None,
        train: bool,
        memory: Float[Array, "B source D"] | None = None,
        memory_mask: Mask | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, dict[str, Array]]:
        """Final states, the cache and what was tapped, from looked-up embeddings."""
        config, kernels = self.config, fused.choose(self.config.compute, jax.default_backend())
        # A cache holds the virtual tokens already.
        held: dict[str, Any] = {} if cache is not None else dict(self.variables.get("params", {}))
        check_length(config, text.h, prefix_length(held))
        text = behind(held, text)
        door = Sites(jnp.int32(-1), self.taps, self.intervene)
        h = door("embed", add_positions(self, config, kernels, text, train))
        causal = config.attention.mask == "causal"
        if cache is None:
            mask, keys = Mask(causal=causal, query_segments=text.segments, key_segments=text.segments), text.positions
        else:
            mask, keys = Mask(offset=cache.lengths), jnp.arange(cache.capacity)[None]
        both = text.positions, keys
        hidden, cache, kept = run_layers(self, config, kernels, h, mask, both, cache, train, memory, memory_mask)
        return hidden, cache, {**door.kept, **kept}
