"""Encoders that fill in what was hidden: BERT, RoBERTa and ALBERT are settings of one config.

Beside the trunk they have a head that turns every state into logits (a transform in front of the tied table), and,
where there are two token types, a second one that judges a pair of texts by the first token's state. A tree may lack
heads (sentence encoders are published so): then what they would give is None.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xylem.models import fused
from xylem.models.config import TransformerConfig
from xylem.models.fused import Choice
from xylem.models.language_model import LanguageModel, Output
from xylem.models.layers import Dense, Norm, add_bias, parameter
from xylem.models.masks import Mask
from xylem.models.stack import Sites
from xylem.models.transformer import add_positions, check_length, embed_tokens, positions_of, run_layers
from xylem.models.virtual import Text, behind, prepend, prompt_of, virtual_length


class EncoderOutput(Output):
    """``Output`` and the second head's.

    Attributes:
        pooled: the first token's state behind a tanh layer, for what judges whole texts; RoBERTa has none.
        pair_logits: float32; BERT: (is the next text, is not); ALBERT: (in order, swapped).
    """

    pooled: Float[Array, "B D"] | Any = None
    pair_logits: Float[Array, "B 2"] | Any = None


class MaskedLM(LanguageModel):
    """A bidirectional encoder with its masked-token head (BERT 1810.04805, sections 3.1 and A.2).

    ``params`` hold ``embed``, ``positions``, ``token_types``, ``embed_norm``, ``embed_projection`` (a factorised
    embedding), the runs of ``layers``, ``head`` and, for pairs of texts, ``pooler`` and ``pair_head``.
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
        embeddings: Float[Array, "B T E"] | None = None,
        cache: None = None,
        train: bool = False,
    ) -> EncoderOutput:
        """Logits of the token that belongs at every position.

        ``segments`` (0 is padding) keep packed documents apart, and positions then count from each document's start.
        ``embeddings`` replace the look-up of ``tokens``. ``train=True`` applies dropout and needs
        ``rngs={"dropout": key}`` when the rate is above 0.
        """
        config, kernels = self.config, fused.choose(self.config.compute, jax.default_backend())
        self.check_call(token_types)
        held: dict[str, Any] = dict(self.variables.get("params", {}))
        check_length(config, tokens, virtual_length(held, prompt_of(held)))
        if cache is not None:
            raise ValueError(f"cache: the {config.family} family reads whole texts and keeps none")
        if positions is None:
            positions = positions_of(tokens, segments)
        text = Text(embed_tokens(config, tokens, embeddings), positions, segments, token_types)
        text = behind(held, prepend(prompt_of(held), text, None))
        door = Sites(jnp.int32(-1), self.taps, self.intervene)
        h = door("embed", add_positions(self, config, kernels, text, train))
        mask = Mask(causal=False, query_segments=text.segments, key_segments=text.segments)
        both = (text.positions, text.positions)
        hidden, _, kept = run_layers(self, config, kernels, h, mask, both, None, train)
        hidden = hidden[:, h.shape[1] - tokens.shape[1] :]
        # Every head is made at the start; later a tree may lack some, and what they would give is None.
        making, held = self.is_initializing(), dict(self.variables["params"])
        pooled = pair_logits = logits = None
        if "pooler" in held or (making and config.embedding.token_types == 2):
            pooler = Dense(config.d_model, config.init.kernel, config, kernels, name="pooler")
            pooled = jnp.tanh(pooler(hidden[:, 0]).astype(jnp.float32)).astype(hidden.dtype)
            if "pair_head" in held or making:
                judge = Dense(2, config.init.kernel, config, kernels, name="pair_head")
                pair_logits = judge(pooled).astype(jnp.float32)
        if making:
            MaskedTransform(config, kernels, name="head")(hidden)
            held = dict(self.variables["params"])
        if "head" in held:
            logits = self.head(self.head_params(held), hidden)
        return EncoderOutput(logits, hidden, None, {**door.kept, **kept}, pooled, pair_logits)

    @nn.nowrap
    def head(self, params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of final states: the transform, then the embedding table and a bias a token."""
        kernels = fused.choose(self.config.compute, jax.default_backend())
        x: Any = MaskedTransform(self.config, kernels, parent=None).apply({"params": params["head"]}, hidden)
        return add_bias(super().head(params, x), params["head"]["bias"], kernels)

    @nn.nowrap
    def head_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """The part of the tree that ``head`` reads."""
        return {name: params[name] for name in ("embed", "head")}


class MaskedTransform(nn.Module):
    """What stands between a final state and the embedding table: a layer and a norm; owns the output bias too."""

    config: TransformerConfig
    kernels: Choice

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        config, kernels = self.config, self.kernels
        x = Dense(config.embedding_size, config.init.kernel, config, kernels, name="transform")(hidden)
        act = fused.activation if kernels.activation else fused.activation_plain
        flat: Any = act(config.activation, x.reshape(-1, x.shape[-1]))
        parameter(self, "bias", None, (config.vocab_size,), config.compute.param_dtype)
        return Norm(config, kernels, name="norm")(flat.reshape(x.shape))
