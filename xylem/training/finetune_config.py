"""A fine-tuning run as one value: a pretraining run's, which begins with a base and grafts a method onto it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xylem.errors import ConfigError
from xylem.models.config import ModelConfig, Seq2SeqConfig, TransformerConfig
from xylem.peft.config import (
    AdaLoRAConfig,
    AdapterConfig,
    BitFitConfig,
    ChildConfig,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    OLoRAConfig,
    PrefixConfig,
    PromptConfig,
    QLoRAConfig,
    ReLoRAConfig,
    SelectionConfig,
    StateConfig,
)
from xylem.training.config import RunConfig, objectives_of
from xylem.training.objective_config import Objective

MethodConfig = (
    LoRAConfig
    | QLoRAConfig
    | DoRAConfig
    | OLoRAConfig
    | AdaLoRAConfig
    | ReLoRAConfig
    | IA3Config
    | AdapterConfig
    | PromptConfig
    | PrefixConfig
    | StateConfig
    | BitFitConfig
    | SelectionConfig
    | ChildConfig
)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Everything a fine-tuning run is made of.

    ``objective.name`` also says what the data is: ``answers`` are conversations (``data/conversations.py``),
    ``classification`` are texts with labels (``data/labelled.py``), ``token_classification`` words with labels
    (``data/tagged.py``), all others read a corpus as pretraining does.

    Attributes:
        base: the model it begins with, as ``training.restore.open_model`` names it.
        base_hash: ``peft.saving.fingerprint`` of its weights; found, not chosen.
        method: what is grafted onto it, and its choices.
        labels: the names of what it learns to judge by, in the order of its head; found, not chosen.
    """

    base: str = ""
    base_hash: str = ""
    method: MethodConfig = field(default_factory=LoRAConfig)
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.method, AdaLoRAConfig) and self.ema is not None:
            raise ConfigError("ema", self.ema, "None: the average of values that come and go exceeds AdaLoRA's budget")

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the base can be taught by."""
        return (*objectives_of(self.model), *taught_by(self.model))


# Which head (``models/heads.py``) the objectives that judge teach.
HEADS: dict[Objective, Literal["classifier", "tagger"]] = {
    "classification": "classifier",
    "token_classification": "tagger",
}


def room_for(model: ModelConfig, virtual: int) -> int:
    """The longest row beside so many virtual tokens: a learned position each, where a network learns those."""
    side = model.decoder if isinstance(model, Seq2SeqConfig) else model
    learned = isinstance(side, TransformerConfig) and side.positions.kind == "learned"
    return model.max_length - virtual if learned else model.max_length


def taught_by(model: ModelConfig) -> tuple[Objective, ...]:
    """The objectives of fine-tuning alone that a kind of model can be taught by."""
    encodes = isinstance(model, TransformerConfig) and model.attention.mask == "bidirectional"
    holds: list[tuple[Objective, bool]] = [
        ("answers", isinstance(model, Seq2SeqConfig) or "causal_lm" in objectives_of(model)),
        ("classification", isinstance(model, TransformerConfig)),
        ("token_classification", encodes),
    ]
    return tuple(name for name, fits in holds if fits)
