"""Mamba as transformers stores it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xylem.models import mamba
from xylem.models.conversion import Row
from xylem.models.families.family import Family, linear, require, size, value
from xylem.models.state_config import MambaConfig

MIXER, OURS = "layers.{layer}.mixer", "layers/mixer"


def _kernels(theirs: str, *ours: str) -> Row:
    """A map without bias that holds several of ours, one behind the other."""
    return Row(f"{MIXER}.{theirs}.weight", tuple(f"{OURS}/{name}/kernel" for name in ours), transposed=True)


ROWS = (
    Row("embeddings.weight", ("embed/embedding",)),
    Row("layers.{layer}.norm.weight", ("layers/mixer_norm/scale",)),
    _kernels("in_proj", "input", "gate"),
    Row(f"{MIXER}.conv1d.weight", (f"{OURS}/conv/kernel",), transposed=True, depthwise=True),
    Row(f"{MIXER}.conv1d.bias", (f"{OURS}/conv/bias",)),
    _kernels("x_proj", "low", "B", "C"),
    *linear(f"{MIXER}.dt_proj", f"{OURS}/delta"),
    Row(f"{MIXER}.A_log", (f"{OURS}/A_log",)),
    Row(f"{MIXER}.D", (f"{OURS}/D",)),
    _kernels("out_proj", "output"),
    Row("norm_f.weight", ("final_norm/scale",)),
    Row("lm_head.weight", ("head/kernel",), transposed=True),
)


def _to_config(raw: Mapping[str, Any]) -> MambaConfig:
    fixed = {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "residual_in_fp32": True}
    require(raw, "mamba", fixed)
    d_model = size(raw, "hidden_size", 768)
    # transformers writes the word "auto" only where the rank was never worked out.
    rank = None if raw.get("time_step_rank") == "auto" else size(raw, "time_step_rank", -(-d_model // 16))
    config = mamba.mamba(
        num_layers=size(raw, "num_hidden_layers", 32),
        d_model=d_model,
        vocab_size=size(raw, "vocab_size", 50_280),
        max_length=size(raw, "max_position_embeddings", 2048),
        expand=size(raw, "expand", 2),
        state_size=size(raw, "state_size", 16),
        conv_width=size(raw, "conv_kernel", 4),
        dt_rank=rank,
        head="tied" if value(raw, "tie_word_embeddings", bool, True) else "untied",
    )
    return replace(config, norm_eps=value(raw, "layer_norm_epsilon", float, 1e-5))


def _from_config(config: MambaConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,  # a word of ours here: the network itself has no longest sequence
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "expand": config.d_inner // config.d_model,
        "state_size": config.state_size,
        "conv_kernel": config.conv_width,
        "time_step_rank": config.dt_rank,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.head == "tied",
    }


MAMBA = Family(
    architecture="MambaForCausalLM",
    prefix="backbone.",
    outside=re.compile(r"lm_head\.weight"),
    rows=ROWS,
    ignored=re.compile(r"(?!)"),
    to_config=_to_config,
    from_config=_from_config,
)
