"""T5 of both versions as transformers stores it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xylem.models import t5
from xylem.models.config import PositionConfig, Seq2SeqConfig
from xylem.models.conversion import Row
from xylem.models.families.family import Family, choice, require, size, spelled, value

# Version 1.0 writes "relu", 1.1 "gated-gelu", which is the tanh form.
PROJECTIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}


def _kernel(theirs: str, ours: str) -> Row:
    return Row(f"{theirs}.weight", (f"{ours}/kernel",), transposed=True)


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    pairs = {"query": "q", "key": "k", "value": "v", "output": "o"}
    return tuple(_kernel(f"{theirs}.{word}", f"{ours}/{name}") for name, word in pairs.items())


def _side(side: str, gated: bool) -> tuple[Row, ...]:
    block, layers = f"{side}.block.{{layer}}.layer", f"{side}/layers"
    last = 2 if side == "decoder" else 1
    mlp = f"{block}.{last}.DenseReluDense"
    up = (_kernel(f"{mlp}.wi_0", f"{layers}/mlp/gate"), _kernel(f"{mlp}.wi_1", f"{layers}/mlp/up"))
    cross = (
        *_attention(f"{block}.1.EncDecAttention", f"{layers}/cross_attention"),
        Row(f"{block}.1.layer_norm.weight", (f"{layers}/cross_attention_norm/scale",)),
    )
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(bias, (f"{side}/relative_bias/embedding",)),
        *_attention(f"{block}.0.SelfAttention", f"{layers}/attention"),
        Row(f"{block}.0.layer_norm.weight", (f"{layers}/attention_norm/scale",)),
        *(cross if side == "decoder" else ()),
        *(up if gated else (_kernel(f"{mlp}.wi", f"{layers}/mlp/up"),)),
        _kernel(f"{mlp}.wo", f"{layers}/mlp/down"),
        Row(f"{block}.{last}.layer_norm.weight", (f"{layers}/mlp_norm/scale",)),
        Row(f"{side}.final_layer_norm.weight", (f"{side}/final_norm/scale",)),
    )


def _rows(config: Seq2SeqConfig) -> tuple[Row, ...]:
    gated = config.decoder.gated
    head = _kernel("lm_head", "head")
    return Row("shared.weight", ("embed/embedding",)), *_side("encoder", gated), *_side("decoder", gated), head


def _to_config(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    require(raw, "t5", {"is_encoder_decoder": True})
    # transformers 5 writes tie_word_embeddings = true for all, and means untied where the file holds both tables.
    tied = value(raw, "tie_word_embeddings", bool, True)
    scaled = value(raw, "scale_decoder_outputs", bool, tied)
    tied = tied and (scaled or not value(raw, "holds_head", bool, False))
    head = ("tied_scaled" if scaled else "tied") if tied else "untied"
    layers = size(raw, "num_layers")
    config = t5.t5(
        layers,
        size(raw, "d_model"),
        size(raw, "num_heads"),
        size(raw, "d_kv"),
        size(raw, "d_ff"),
        vocab_size=size(raw, "vocab_size"),
        max_length=size(raw, "n_positions", 512),
    )
    buckets, distance = (
        size(raw, "relative_attention_num_buckets", 32),
        size(raw, "relative_attention_max_distance", 128),
    )

    def side(stack: Any, num_layers: int) -> Any:
        return replace(
            stack,
            num_layers=num_layers,
            activation=choice(raw, "feed_forward_proj", PROJECTIONS, "relu"),
            norm_eps=value(raw, "layer_norm_epsilon", float, 1e-6),
            positions=PositionConfig("relative", buckets=buckets, max_distance=distance),
            head=head,
            dropout=value(raw, "dropout_rate", float, 0.1),
        )

    decoder = side(config.decoder, size(raw, "num_decoder_layers", layers))
    start = value(raw, "decoder_start_token_id", int, 0)
    return Seq2SeqConfig("t5", side(config.encoder, layers), decoder, start)


def _from_config(config: Seq2SeqConfig) -> dict[str, Any]:
    encoder, decoder = config.encoder, config.decoder
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": decoder.head_dim,
        "d_ff": decoder.d_ff,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_heads": decoder.num_heads,
        "n_positions": decoder.max_length,
        "relative_attention_num_buckets": decoder.positions.buckets,
        "relative_attention_max_distance": decoder.positions.max_distance,
        "feed_forward_proj": spelled(PROJECTIONS, decoder.activation),
        "layer_norm_epsilon": decoder.norm_eps,
        "dropout_rate": decoder.dropout,
        "tie_word_embeddings": decoder.head != "untied",
        "scale_decoder_outputs": decoder.head == "tied_scaled",
        "decoder_start_token_id": config.decoder_start,
        "is_encoder_decoder": True,
    }


T5 = Family(
    architecture="T5ForConditionalGeneration",
    prefix="",
    outside=re.compile(r"lm_head\.weight"),
    rows=_rows,
    ignored=re.compile(
        r"(encoder|decoder)\.embed_tokens\.weight"
        r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # stored once, never used
    ),
    to_config=_to_config,
    from_config=_from_config,
)
