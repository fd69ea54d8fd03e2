"""BERT, RoBERTa and ALBERT as transformers stores them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xylem.errors import ConfigError
from xylem.models import bert
from xylem.models.config import PositionConfig, TransformerConfig
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

RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
EMBEDDINGS = (
    Row("embeddings.word_embeddings.weight", ("embed/embedding",)),
    Row("embeddings.position_embeddings.weight", ("positions/embedding",)),
    Row("embeddings.token_type_embeddings.weight", ("token_types/embedding",)),
    *norm("embeddings.LayerNorm", "embed_norm"),
)


def _layers(theirs: str, attention: str, output: str, norms: tuple[str, str], mlp: tuple[str, str]) -> tuple[Row, ...]:
    """Rows of a layer; what is named within ``theirs`` differs between BERT and ALBERT."""
    return (
        *linear(f"{theirs}.{attention}.query", "layers/attention/query"),
        *linear(f"{theirs}.{attention}.key", "layers/attention/key"),
        *linear(f"{theirs}.{attention}.value", "layers/attention/value"),
        *linear(f"{theirs}.{output}", "layers/attention/output"),
        *norm(f"{theirs}.{norms[0]}", "layers/attention_norm"),
        *linear(f"{theirs}.{mlp[0]}", "layers/mlp/up"),
        *linear(f"{theirs}.{mlp[1]}", "layers/mlp/down"),
        *norm(f"{theirs}.{norms[1]}", "layers/mlp_norm"),
    )


def _head(transform: str, scales: str, bias: str) -> tuple[Row, ...]:
    return *linear(transform, "head/transform"), *norm(scales, "head/norm"), Row(bias, ("head/bias",))


# One name for two heads: a file has one of them, and its class says which.
HEADS = (*linear("classifier", "classifier"), *linear("classifier", "tagger"))
BERT_LAYERS = _layers(
    "encoder.layer.{layer}",
    "attention.self",
    "attention.output.dense",
    ("attention.output.LayerNorm", "output.LayerNorm"),
    ("intermediate.dense", "output.dense"),
)
BERT_ROWS = (
    *EMBEDDINGS,
    *BERT_LAYERS,
    *linear("pooler.dense", "pooler"),
    *_head("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    *linear("cls.seq_relationship", "pair_head"),
    *HEADS,
)
ROBERTA_ROWS = (
    *EMBEDDINGS,
    *BERT_LAYERS,
    *_head("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    *linear("classifier.dense", "classifier/dense"),
    *linear("classifier.out_proj", "classifier"),
    *linear("classifier", "tagger"),
)
ALBERT_ROWS = (
    *EMBEDDINGS,
    *linear("encoder.embedding_hidden_mapping_in", "embed_projection"),
    *_layers(
        "encoder.albert_layer_groups.{layer}.albert_layers.0",
        "attention",
        "attention.dense",
        ("attention.LayerNorm", "full_layer_layer_norm"),
        ("ffn", "ffn_output"),
    ),
    *linear("pooler", "pooler"),
    *_head("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
    *linear("sop_classifier.classifier", "pair_head"),
    *HEADS,
)


def _classes(name: str) -> dict[str, str]:
    return {"classifier": f"{name}ForSequenceClassification", "tagger": f"{name}ForTokenClassification"}


def _common(raw: Mapping[str, Any], family: str, config: TransformerConfig) -> TransformerConfig:
    """What all three read alike, on top of the family's own ``config``."""
    require(raw, family, {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"})
    require(raw, family, {"tie_word_embeddings": True})
    head_width(config.num_heads, config.d_model, "num_attention_heads")
    return replace(
        config,
        activation=choice(raw, "hidden_act", ACTIVATIONS, "gelu_new" if family == "albert" else "gelu"),
        norm_eps=value(raw, "layer_norm_eps", float, 1e-12),
        embedding=replace(config.embedding, token_types=size(raw, "type_vocab_size", 2)),
        dropout=one_rate(raw, RATES, family, 0.0 if family == "albert" else 0.1),
    )


def _sizes(raw: Mapping[str, Any]) -> tuple[int, int, int, int]:
    layers, width = size(raw, "num_hidden_layers"), size(raw, "hidden_size")
    return layers, width, size(raw, "num_attention_heads"), size(raw, "vocab_size")


def _written(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length + config.positions.offset,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": spelled(ACTIVATIONS, config.activation),
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.embedding.token_types,
        **dict.fromkeys(RATES, config.dropout),
    }


def _bert_to_config(raw: Mapping[str, Any]) -> TransformerConfig:
    length = size(raw, "max_position_embeddings", 512)
    return _common(raw, "bert", bert.bert(*_sizes(raw), length, d_ff=size(raw, "intermediate_size")))


def _roberta_to_config(raw: Mapping[str, Any]) -> TransformerConfig:
    require(raw, "roberta", {"hidden_act": "gelu"})  # its head has this one whatever the layers have
    # fairseq numbers positions from the padding id on: with id 1, the first real token stands in row 2.
    offset = value(raw, "pad_token_id", int, 1) + 1
    rows = size(raw, "max_position_embeddings", 514)
    if rows <= offset:
        raise ConfigError("max_position_embeddings", rows, f"the first {offset} rows stand for no position")
    config = replace(bert.roberta(*_sizes(raw), rows - offset), d_ff=size(raw, "intermediate_size"))
    return _common(raw, "roberta", replace(config, positions=PositionConfig("learned", offset=offset)))


def _roberta_from_config(config: TransformerConfig) -> dict[str, Any]:
    return {**_written(config), "pad_token_id": config.positions.offset - 1}


def _albert_to_config(raw: Mapping[str, Any]) -> TransformerConfig:
    require(raw, "albert", {"num_hidden_groups": 1, "inner_group_num": 1})
    config = bert.albert(*_sizes(raw), size(raw, "embedding_size", 128), size(raw, "intermediate_size"))
    length = size(raw, "max_position_embeddings", 512)
    return _common(raw, "albert", replace(config, max_length=length))


def _albert_from_config(config: TransformerConfig) -> dict[str, Any]:
    return {**_written(config), "embedding_size": config.embedding_size, "num_hidden_groups": 1, "inner_group_num": 1}


BERT = Family(
    architecture="BertForPreTraining",
    prefix="bert.",
    outside=re.compile(r"(cls|classifier)\..*"),
    rows=BERT_ROWS,
    ignored=re.compile(r"embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)"),
    to_config=_bert_to_config,
    from_config=_written,
    optional=("head", "pair_head", "pooler"),
    heads=_classes("Bert"),
)
ROBERTA = Family(
    architecture="RobertaForMaskedLM",
    prefix="roberta.",
    outside=re.compile(r"(lm_head|classifier)\..*"),
    rows=ROBERTA_ROWS,
    ignored=re.compile(r"embeddings\.position_ids|lm_head\.decoder\.(weight|bias)|pooler\.dense\.(weight|bias)"),
    to_config=_roberta_to_config,
    from_config=_roberta_from_config,
    optional=("head",),
    heads=_classes("Roberta"),
)
ALBERT = Family(
    architecture="AlbertForPreTraining",
    prefix="albert.",
    outside=re.compile(r"(predictions|sop_classifier|classifier)\..*"),
    rows=ALBERT_ROWS,
    ignored=re.compile(r"embeddings\.position_ids|predictions\.decoder\.(weight|bias)"),
    to_config=_albert_to_config,
    from_config=_albert_from_config,
    optional=("head", "pair_head", "pooler"),
    heads=_classes("Albert"),
)
