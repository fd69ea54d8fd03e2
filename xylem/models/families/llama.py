"""LLaMA as transformers stores it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xylem.errors import ConfigError
from xylem.models import llama
from xylem.models.config import RopeScaling, TransformerConfig
from xylem.models.conversion import Row
from xylem.models.families.family import Family, choice, head_width, require, size, spelled, value

LLAMA_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def _linear(theirs: str, ours: str) -> Row:
    return Row(f"{theirs}.weight", (f"{ours}/kernel",), transposed=True)


LLAMA_ROWS = (
    Row("embed_tokens.weight", ("embed/embedding",)),
    Row("layers.{layer}.input_layernorm.weight", ("layers/attention_norm/scale",)),
    _linear("layers.{layer}.self_attn.q_proj", "layers/attention/query"),
    _linear("layers.{layer}.self_attn.k_proj", "layers/attention/key"),
    _linear("layers.{layer}.self_attn.v_proj", "layers/attention/value"),
    _linear("layers.{layer}.self_attn.o_proj", "layers/attention/output"),
    Row("layers.{layer}.post_attention_layernorm.weight", ("layers/mlp_norm/scale",)),
    _linear("layers.{layer}.mlp.gate_proj", "layers/mlp/gate"),
    _linear("layers.{layer}.mlp.up_proj", "layers/mlp/up"),
    _linear("layers.{layer}.mlp.down_proj", "layers/mlp/down"),
    Row("norm.weight", ("final_norm/scale",)),
    _linear("lm_head", "head"),
)


def _llama_to_config(raw: Mapping[str, Any]) -> TransformerConfig:
    require(raw, "llama", {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0})
    # transformers 4 has rope_theta beside rope_scaling, transformers 5 both inside rope_parameters.
    rope = value(raw, "rope_scaling", dict, None) or value(raw, "rope_parameters", dict, {})
    for fields in (raw, rope):
        require(fields, "llama", {"partial_rotary_factor": 1.0})
    d_model, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    head_dim = size(raw, "head_dim", head_width(heads, d_model, "num_attention_heads"))
    max_length = size(raw, "max_position_embeddings", 2048)
    config = llama.llama(
        num_layers=size(raw, "num_hidden_layers"),
        d_model=heads * head_dim,  # what makes heads of head_dim; the model's own width follows
        num_heads=heads,
        num_kv_heads=size(raw, "num_key_value_heads", heads),
        d_ff=size(raw, "intermediate_size"),
        vocab_size=size(raw, "vocab_size"),
        max_length=max_length,
        rope_theta=value(rope, "rope_theta", float, value(raw, "rope_theta", float, 10_000.0)),
        norm_eps=value(raw, "rms_norm_eps", float, 1e-6),
        rope_scaling=_rope_scaling(rope, max_length),
        head="tied" if value(raw, "tie_word_embeddings", bool, False) else "untied",
    )
    return replace(config, d_model=d_model, activation=choice(raw, "hidden_act", LLAMA_ACTIVATIONS, "silu"))


def _rope_scaling(rope: Mapping[str, Any], max_length: int) -> RopeScaling | None:
    kind = value(rope, "rope_type", str, value(rope, "type", str, "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError("rope_type", kind, "it must be default or llama3", ("default", "llama3"))
    return RopeScaling(
        factor=value(rope, "factor", float),
        low_frequency_factor=value(rope, "low_freq_factor", float),
        high_frequency_factor=value(rope, "high_freq_factor", float),
        original_max_length=size(rope, "original_max_position_embeddings", max_length),
    )


def _llama_from_config(config: TransformerConfig) -> dict[str, Any]:
    scaling = config.positions.rope_scaling
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": spelled(LLAMA_ACTIVATIONS, config.activation),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.positions.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.head == "tied",
    }


LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    outside=re.compile(r"lm_head\.weight"),
    rows=LLAMA_ROWS,
    ignored=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    to_config=_llama_to_config,
    from_config=_llama_from_config,
)
