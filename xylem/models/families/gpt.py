"""GPT-2 and GPT-1 as transformers stores them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xylem.models import gpt
from xylem.models.config import TransformerConfig
from xylem.models.conversion import Row
from xylem.models.families.family import (
    ACTIVATIONS,
    Family,
    choice,
    head_width,
    norm,
    one_rate,
    require,
    size,
    spelled,
    value,
)

RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def _both(theirs: str, *ours: str) -> tuple[Row, Row]:
    """Weight and bias of a GPT-2 projection, whose kernels (``Conv1D``) are (in, out) as ours."""
    return (
        Row(f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours)),
        Row(f"{theirs}.bias", tuple(f"{path}/bias" for path in ours)),
    )


GPT2_ROWS = (
    Row("wte.weight", ("embed/embedding",)),
    Row("wpe.weight", ("positions/embedding",)),
    *norm("h.{layer}.ln_1", "layers/attention_norm"),
    *_both("h.{layer}.attn.c_attn", *(f"layers/attention/{name}" for name in ("query", "key", "value"))),
    *_both("h.{layer}.attn.c_proj", "layers/attention/output"),
    *norm("h.{layer}.ln_2", "layers/mlp_norm"),
    *_both("h.{layer}.mlp.c_fc", "layers/mlp/up"),
    *_both("h.{layer}.mlp.c_proj", "layers/mlp/down"),
    *norm("ln_f", "final_norm"),
    Row("lm_head.weight", ("head/kernel",), transposed=True),
    Row("score.weight", ("classifier/kernel",), transposed=True),
)


def _gpt2_to_config(raw: Mapping[str, Any]) -> TransformerConfig:
    fixed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    require(raw, "gpt2", fixed)
    d_model, heads = size(raw, "n_embd"), size(raw, "n_head")
    head_width(heads, d_model, "n_head")
    return replace(
        gpt.gpt(size(raw, "n_layer"), d_model, heads, size(raw, "vocab_size"), size(raw, "n_positions")),
        d_ff=size(raw, "n_inner", 4 * d_model),
        activation=choice(raw, "activation_function", ACTIVATIONS, "gelu_new"),
        norm_eps=value(raw, "layer_norm_epsilon", float, 1e-5),
        head="tied" if value(raw, "tie_word_embeddings", bool, True) else "untied",
        dropout=one_rate(raw, RATES, "gpt2", 0.1),
    )


def _gpt2_from_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": spelled(ACTIVATIONS, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(RATES, config.dropout),
        "tie_word_embeddings": config.head == "tied",
    }


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    outside=re.compile(r"(lm_head|score)\.weight"),
    rows=GPT2_ROWS,
    ignored=re.compile(r"h\.\d+\.attn\.(masked_)?bias"),
    to_config=_gpt2_to_config,
    from_config=_gpt2_from_config,
    heads={"classifier": "GPT2ForSequenceClassification"},
)

# GPT-1 names the embeddings otherwise and has no last norm; the norms stand behind the sublayers under the same names.
GPT1_ROWS = (
    Row("tokens_embed.weight", ("embed/embedding",)),
    Row("positions_embed.weight", ("positions/embedding",)),
    *(row for row in GPT2_ROWS if row.theirs.startswith(("h.", "score."))),
)


def _gpt1_to_config(raw: Mapping[str, Any]) -> TransformerConfig:
    require(raw, "openai-gpt", {"tie_word_embeddings": True})
    d_model, heads = size(raw, "n_embd"), size(raw, "n_head")
    head_width(heads, d_model, "n_head")
    sizes = size(raw, "n_layer"), d_model, heads, size(raw, "vocab_size"), size(raw, "n_positions")
    return replace(
        gpt.gpt1(*sizes),
        activation=choice(raw, "afn", GPT1_ACTIVATIONS, "gelu"),
        norm_eps=value(raw, "layer_norm_epsilon", float, 1e-5),
        dropout=one_rate(raw, RATES, "openai-gpt", 0.1),
    )


def _gpt1_from_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "afn": spelled(GPT1_ACTIVATIONS, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(RATES, config.dropout),
    }


# modeling_openai.py: what it calls gelu is the tanh form.
GPT1_ACTIVATIONS = {
    "gelu": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
GPT1 = Family(
    architecture="OpenAIGPTLMHeadModel",
    prefix="transformer.",
    outside=GPT2.outside,
    rows=GPT1_ROWS,
    ignored=re.compile(r"h\.\d+\.attn\.bias|lm_head\.weight|position_ids"),
    to_config=_gpt1_to_config,
    from_config=_gpt1_from_config,
    heads={"classifier": "OpenAIGPTForSequenceClassification"},
)
