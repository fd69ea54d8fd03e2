"""How other people store each family: names and layouts of its tensors, and the words of its ``config.json``.

To add a family, add an entry to ``FAMILIES``. A setting that the networks here do not implement is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from xylem.errors import ConfigError
from xylem.models import gpt, llama
from xylem.models.config import RopeScaling, TransformerConfig
from xylem.models.conversion import Row

REQUIRED = object()
FLOAT32_MAX = 3.4028235e38


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is stored.

    Attributes:
        architecture: the class of transformers that is its language model.
        prefix: before every tensor's name but the head's; files of the bare network leave it out.
        ignored: tensors that hold nothing learned: masks and frequencies which old releases stored.
        to_config: ``config.json`` -> configuration.
        from_config: the other way; what it cannot express shows when its result is read back.
    """

    architecture: str
    prefix: str
    rows: tuple[Row, ...]
    ignored: re.Pattern[str]
    to_config: Callable[[Mapping[str, Any]], TransformerConfig]
    from_config: Callable[[TransformerConfig], dict[str, Any]]


# --- reading a stranger's configuration ------------------------------------------------------------------------------


def value(raw: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED) -> Any:
    """One field, of type ``kind``; ``default`` where it is absent or null."""
    found = raw.get(key)
    if found is None:
        if default is REQUIRED:
            raise ConfigError(key, None, "the checkpoint's configuration must give it")
        return default
    kinds = (int, float) if kind is float else kind
    if not isinstance(found, kinds) or (isinstance(found, bool) and kind is not bool):
        raise ConfigError(key, found, f"it must be of type {kind.__name__}")
    if kind is float and not abs(found) < FLOAT32_MAX:  # NaN and infinity too: Python's JSON reads them
        raise ConfigError(key, found, "it must be a finite float32")
    return kind(found)


def size(raw: Mapping[str, Any], key: str, default: Any = REQUIRED) -> int:
    """A count from 1 to what an int32 holds."""
    found = value(raw, key, int, default)
    if not 1 <= found < 2**31:
        raise ConfigError(key, found, "it must lie between 1 and 2^31 - 1")
    return found


def choice(raw: Mapping[str, Any], key: str, table: Mapping[str, str], default: str) -> str:
    """Our word for one of theirs."""
    found = value(raw, key, str, default)
    if found not in table:
        raise ConfigError(key, found, f"it must be one of {', '.join(table)}", table)
    return table[found]


def spelled(table: Mapping[str, str], ours: str) -> str:
    """Their first word for one of ours; ours where they have none, which reading back refuses."""
    return next((theirs for theirs, word in table.items() if word == ours), ours)


def require(raw: Mapping[str, Any], family: str, allowed: Mapping[str, Any]) -> None:
    """Refuse settings that the networks here do not implement; each may be absent."""
    for key, only in allowed.items():
        if raw.get(key, only) not in (only, None):
            raise ConfigError(key, raw[key], f"{family} is implemented for {only!r} only")


def head_width(heads: int, d_model: int, key: str) -> int:
    """The width of one head when the heads share the model's."""
    if d_model % heads:
        raise ConfigError(key, heads, f"it must divide the model's width {d_model}")
    return d_model // heads


# --- GPT-2 -----------------------------------------------------------------------------------------------------------

# transformers, activations.py. Several of its words mean one function; the first is the one we write.
GPT2_ACTIVATIONS = {
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
    **{"silu": "silu", "swish": "silu"},
}


def _both(theirs: str, *ours: str) -> tuple[Row, Row]:
    """Weight and bias of a GPT-2 projection, whose kernels (``Conv1D``) are (in, out) as ours."""
    return (
        Row(f"{theirs}.weight", tuple(f"{path}/kernel" for path in ours)),
        Row(f"{theirs}.bias", tuple(f"{path}/bias" for path in ours)),
    )


def _norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", (f"{ours}/scale",)), Row(f"{theirs}.bias", (f"{ours}/bias",))


GPT2_ROWS = (
    Row("wte.weight", ("embed/embedding",)),
    Row("wpe.weight", ("positions/embedding",)),
    *_norm("h.{layer}.ln_1", "layers/attention_norm"),
    *_both("h.{layer}.attn.c_attn", *(f"layers/attention/{name}" for name in ("query", "key", "value"))),
    *_both("h.{layer}.attn.c_proj", "layers/attention/output"),
    *_norm("h.{layer}.ln_2", "layers/mlp_norm"),
    *_both("h.{layer}.mlp.c_fc", "layers/mlp/up"),
    *_both("h.{layer}.mlp.c_proj", "layers/mlp/down"),
    *_norm("ln_f", "final_norm"),
    Row("lm_head.weight", ("head/kernel",), transposed=True),
)


def _gpt2_to_config(raw: Mapping[str, Any]) -> TransformerConfig:
    fixed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    require(raw, "gpt2", fixed)
    rates = {key: value(raw, key, float, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(rates.values())) > 1:
        raise ConfigError("dropout", rates, "gpt2 is implemented with one rate for all three")
    d_model, heads = size(raw, "n_embd"), size(raw, "n_head")
    head_width(heads, d_model, "n_head")
    return replace(
        gpt.gpt(size(raw, "n_layer"), d_model, heads, size(raw, "vocab_size"), size(raw, "n_positions")),
        d_ff=size(raw, "n_inner", 4 * d_model),
        activation=choice(raw, "activation_function", GPT2_ACTIVATIONS, "gelu_new"),
        norm_eps=value(raw, "layer_norm_epsilon", float, 1e-5),
        head="tied" if value(raw, "tie_word_embeddings", bool, True) else "untied",
        dropout=rates["resid_pdrop"],
    )


def _gpt2_from_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": spelled(GPT2_ACTIVATIONS, config.activation),
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": config.head == "tied",
    }


# --- LLaMA -----------------------------------------------------------------------------------------------------------

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
    scaling = config.rope_scaling
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
        "rope_theta": config.rope_theta,
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


FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        rows=GPT2_ROWS,
        ignored=re.compile(r"h\.\d+\.attn\.(masked_)?bias"),
        to_config=_gpt2_to_config,
        from_config=_gpt2_from_config,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        prefix="model.",
        rows=LLAMA_ROWS,
        ignored=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
        to_config=_llama_to_config,
        from_config=_llama_from_config,
    ),
}
