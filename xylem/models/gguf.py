"""GGUF files of the LLaMA family (llama.cpp), quantized or not, read into our trees.

Names and metadata: ggml-org/llama.cpp, gguf-py/gguf/constants.py. The rows of each query and key head are stored in the
order of Meta's rotary pairs (convert_hf_to_gguf.py, ``permute``), which the table undoes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xylem.errors import ConfigError
from xylem.models import llama
from xylem.models.config import RopeScaling, TransformerConfig
from xylem.models.conversion import Row
from xylem.models.families.family import head_width, require, size, value
from xylem.models.gguf_file import Packed, header
from xylem.models.positions import rope_frequencies


def _linear(theirs: str, ours: str, interleaved: bool = False) -> Row:
    return Row(f"{theirs}.weight", (f"{ours}/kernel",), transposed=True, interleaved=interleaved)


ROWS = (
    Row("token_embd.weight", ("embed/embedding",)),
    Row("blk.{layer}.attn_norm.weight", ("layers/attention_norm/scale",)),
    _linear("blk.{layer}.attn_q", "layers/attention/query", interleaved=True),
    _linear("blk.{layer}.attn_k", "layers/attention/key", interleaved=True),
    _linear("blk.{layer}.attn_v", "layers/attention/value"),
    _linear("blk.{layer}.attn_output", "layers/attention/output"),
    Row("blk.{layer}.ffn_norm.weight", ("layers/mlp_norm/scale",)),
    _linear("blk.{layer}.ffn_gate", "layers/mlp/gate"),
    _linear("blk.{layer}.ffn_up", "layers/mlp/up"),
    _linear("blk.{layer}.ffn_down", "layers/mlp/down"),
    Row("output_norm.weight", ("final_norm/scale",)),
    _linear("output", "head"),
)
FREQUENCIES = "rope_freqs.weight"


def open_file(path: Path) -> tuple[TransformerConfig, tuple[Row, ...], dict[str, Packed]]:
    """Configuration, table and tensors of a file; no weight is read yet.

    Raises:
        ConfigError: the file is missing or damaged, of another architecture, or asks for what is not implemented.
    """
    raw, tensors = header(path)
    frequencies = tensors.pop(FREQUENCIES, None)
    config = _config(raw, tensors, None if frequencies is None else next(frequencies.blocks(1 << 20)))
    return config, ROWS, tensors


def _config(raw: Mapping[str, Any], tensors: Mapping[str, Packed], frequencies: np.ndarray | None) -> TransformerConfig:
    require(raw, "GGUF", {"general.architecture": "llama"})
    # llama.cpp takes a factor without a type for linear scaling; scale_linear is its older name.
    unscaled = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "llama.rope.scale_linear": 1.0}
    require(raw, "llama", {"llama.expert_count": 0, **unscaled})
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError("checkpoint", "token_embd.weight", "the file must hold this tensor")
    d_model, heads = size(raw, "llama.embedding_length"), size(raw, "llama.attention.head_count")
    if "llama.attention.key_length" in raw:
        head_dim = size(raw, "llama.attention.key_length")
    else:
        head_dim = head_width(heads, d_model, "llama.attention.head_count")
    require(raw, "llama", dict.fromkeys(("llama.rope.dimension_count", "llama.attention.value_length"), head_dim))
    theta = _decimal(value(raw, "llama.rope.freq_base", float, 10_000.0))
    config = llama.llama(
        num_layers=size(raw, "llama.block_count"),
        d_model=heads * head_dim,  # what makes heads of head_dim; the model's own width follows
        num_heads=heads,
        num_kv_heads=size(raw, "llama.attention.head_count_kv", heads),
        d_ff=size(raw, "llama.feed_forward_length"),
        vocab_size=embedding.shape[0],
        max_length=size(raw, "llama.context_length"),
        rope_theta=theta,
        norm_eps=_decimal(value(raw, "llama.attention.layer_norm_rms_epsilon", float)),
        rope_scaling=None if frequencies is None else _rope_scaling(frequencies, head_dim, theta),
        head="untied" if "output.weight" in tensors else "tied",
    )
    return replace(config, d_model=d_model)


def _decimal(stored: float) -> float:
    """The number that was meant: metadata is float32, where 1e-5 reads 9.999999747378752e-06."""
    return float(str(np.float32(stored)))


def _rope_scaling(factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling:
    """LLaMA 3.1's scaling from what the file holds of it: by how much each frequency is divided.

    The three numbers beside the factor are those of every LLaMA since 3.1; whether they are is checked.
    """
    scaling = RopeScaling(float(factors.max()), 1.0, 4.0, 8192)
    expected = rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling)
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-3):
        raise ConfigError(FREQUENCIES, factors.shape, "the rotary frequencies are not scaled as LLaMA 3.1's are")
    return scaling
