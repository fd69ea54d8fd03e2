"""Networks as pure functions of (parameters, tokens).

One legend for every annotation and einsum:

====  =========================  ====  ==============================
B     batch                      H     head dimension
T     query length               V     vocabulary
S     key length                 L     layers
D     model width                R     rank
F     feed-forward width         E     experts, or heads x head dim
N     heads                      G     query heads a key/value head
K     key/value heads            Z     states a channel (Mamba)
W     tokens of a window
I     inner channels (Mamba), or inputs of a kernel whose outputs are O
====  =========================  ====  ==============================

``build(config)`` gives the module; ``PRESETS`` every published size by name. Nothing here imports jax until ``build``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xylem.models import bart, bert, gpt, llama, mamba, t5, vanilla
from xylem.models.config import ModelConfig, Seq2SeqConfig
from xylem.models.state_config import MambaConfig, RecurrentConfig, WindowedConfig

if TYPE_CHECKING:
    from xylem.models.language_model import LanguageModel

_SIZES = {
    gpt: (
        *("gpt1", "gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"),
        *("gpt3_small", "gpt3_medium", "gpt3_large", "gpt3_xl", "gpt3_2_7b", "gpt3_6_7b", "gpt3_13b", "gpt3_175b"),
    ),
    bert: (
        *("bert_base", "bert_large", "roberta_base", "roberta_large"),
        *("albert_base", "albert_large", "albert_xlarge", "albert_xxlarge"),
    ),
    llama: (
        *("llama_7b", "llama_13b", "llama_33b", "llama_65b", "llama2_7b", "llama2_13b", "llama2_70b"),
        *("llama3_8b", "llama3_70b", "llama3_1_8b", "llama3_1_70b", "llama3_1_405b", "llama3_2_1b", "llama3_2_3b"),
        "smollm2",
    ),
    mamba: ("mamba_130m", "mamba_370m", "mamba_790m", "mamba_1_4b", "mamba_2_8b"),
    vanilla: ("transformer_base", "transformer_big"),
    bart: ("bart_base", "bart_large"),
    t5: (
        *("t5_small", "t5_base", "t5_large", "t5_3b", "t5_11b"),
        *("t5_1_1_small", "t5_1_1_base", "t5_1_1_large", "t5_1_1_xl", "t5_1_1_xxl"),
    ),
}
PRESETS: dict[str, Callable[[], ModelConfig]] = {
    name: getattr(family, name) for family, names in _SIZES.items() for name in names
}


def build(config: ModelConfig) -> LanguageModel:
    """The module a config describes: ``init``, ``apply``, ``head`` and ``clone`` are its public calls."""
    if isinstance(config, MambaConfig):
        from xylem.models.mamba_lm import MambaLM

        return MambaLM(config)
    from xylem.models.masked_lm import MaskedLM
    from xylem.models.recurrent import RecurrentLM
    from xylem.models.seq2seq import Seq2Seq
    from xylem.models.transformer import CausalLM
    from xylem.models.windowed import WindowedLM

    if isinstance(config, Seq2SeqConfig):
        return Seq2Seq(config)
    if isinstance(config, RecurrentConfig):
        return RecurrentLM(config)
    if isinstance(config, WindowedConfig):
        return WindowedLM(config)
    return CausalLM(config) if config.attention.mask == "causal" else MaskedLM(config)
