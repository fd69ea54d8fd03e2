"""BART as transformers stores it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xylem.errors import ConfigError
from xylem.models import bart
from xylem.models.config import EmbeddingConfig, PositionConfig, Seq2SeqConfig
from xylem.models.conversion import Row
from xylem.models.families.family import (
    ACTIVATIONS,
    Family,
    choice,
    head_width,
    linear,
    norm,
    one_rate,
    require,
    size,
    spelled,
    value,
)

RATES = ("dropout", "attention_dropout")
OFFSET = 2  # modeling_bart.py, BartLearnedPositionalEmbedding


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    pairs = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    return tuple(row for name, word in pairs.items() for row in linear(f"{theirs}.{word}", f"{ours}/{name}"))


def _side(side: str) -> tuple[Row, ...]:
    layer = f"{side}.layers.{{layer}}"
    cross = (
        *_attention(f"{layer}.encoder_attn", f"{side}/layers/cross_attention"),
        *norm(f"{layer}.encoder_attn_layer_norm", f"{side}/layers/cross_attention_norm"),
    )
    return (
        Row(f"{side}.embed_positions.weight", (f"{side}/positions/embedding",)),
        *norm(f"{side}.layernorm_embedding", f"{side}/embed_norm"),
        *_attention(f"{layer}.self_attn", f"{side}/layers/attention"),
        *norm(f"{layer}.self_attn_layer_norm", f"{side}/layers/attention_norm"),
        *(cross if side == "decoder" else ()),
        *linear(f"{layer}.fc1", f"{side}/layers/mlp/up"),
        *linear(f"{layer}.fc2", f"{side}/layers/mlp/down"),
        *norm(f"{layer}.final_layer_norm", f"{side}/layers/mlp_norm"),
    )


def _to_config(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    # activation_dropout, a third rate that touches training alone, is read as 0: there is none inside our MLP.
    require(raw, "bart", {"tie_word_embeddings": True})
    d_model = size(raw, "d_model")
    config = bart.bart(1, d_model, 1, size(raw, "vocab_size"), size(raw, "max_position_embeddings", 1024))

    def side(name: str, stack: Any) -> Any:
        heads = size(raw, f"{name}_attention_heads")
        return replace(
            stack,
            num_layers=size(raw, f"{name}_layers"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_width(heads, d_model, f"{name}_attention_heads"),
            d_ff=size(raw, f"{name}_ffn_dim"),
            activation=choice(raw, "activation_function", ACTIVATIONS, "gelu"),
            embedding=EmbeddingConfig(
                norm="present", scale="sqrt_d_model" if value(raw, "scale_embedding", bool, False) else "none"
            ),
            positions=PositionConfig("learned", offset=OFFSET),
            dropout=one_rate(raw, RATES, "bart", 0.1),
        )

    start = value(raw, "decoder_start_token_id", int, 2)
    encoder, decoder = side("encoder", config.encoder), side("decoder", config.decoder)
    if encoder.num_heads != decoder.num_heads:
        raise ConfigError("decoder_attention_heads", decoder.num_heads, f"it must be the encoder's {encoder.num_heads}")
    return Seq2SeqConfig("bart", encoder, decoder, start)


def _from_config(config: Seq2SeqConfig) -> dict[str, Any]:
    sides = {
        key: value
        for name in ("encoder", "decoder")
        for key, value in {
            f"{name}_layers": getattr(config, name).num_layers,
            f"{name}_attention_heads": getattr(config, name).num_heads,
            f"{name}_ffn_dim": getattr(config, name).d_ff,
        }.items()
    }
    decoder = config.decoder
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "max_position_embeddings": decoder.max_length,
        **sides,
        "activation_function": spelled(ACTIVATIONS, decoder.activation),
        "scale_embedding": decoder.embedding.scale == "sqrt_d_model",
        **dict.fromkeys(RATES, decoder.dropout),
        "activation_dropout": 0.0,
        "decoder_start_token_id": config.decoder_start,
    }


BART = Family(
    architecture="BartForConditionalGeneration",
    prefix="model.",
    outside=re.compile(r"lm_head\.weight"),
    rows=(Row("shared.weight", ("embed/embedding",)), *_side("encoder"), *_side("decoder")),
    ignored=re.compile(r"(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight|final_logits_bias"),
    to_config=_to_config,
    from_config=_from_config,
)
