"""A fine-tuning run as one value: a pretraining run's, which begins with a base and grafts a method onto it."""

from __future__ import annotations

from dataclasses import dataclass, field

from xylem.models.config import ModelConfig, TransformerConfig
from xylem.peft.config import (
    AdaLoRAConfig,
    AdapterConfig,
    BitFitConfig,
    ChildConfig,
    DoRAConfig,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    QLoRAConfig,
    ReLoRAConfig,
    SelectionConfig,
)
from xylem.training.config import RunConfig, objectives_of
from xylem.training.objective_config import Objective

MethodConfig = (
    LoRAConfig
    | QLoRAConfig
    | DoRAConfig
    | AdaLoRAConfig
    | ReLoRAConfig
    | IA3Config
    | AdapterConfig
    | PromptConfig
    | PrefixConfig
    | BitFitConfig
    | SelectionConfig
    | ChildConfig
)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Everything a fine-tuning run is made of.

    ``objective.name`` also says what the data is: ``answers`` are conversations (``data/conversations.py``),
    ``classification`` are texts with labels (``data/labelled.py``), all others read a corpus as pretraining does.

    Attributes:
        base: the model it begins with, as ``training.restore.open_model`` names it.
        base_hash: ``peft.saving.fingerprint`` of its weights; found, not chosen.
        method: what is grafted onto it, and its choices.
    """

    base: str = ""
    base_hash: str = ""
    method: MethodConfig = field(default_factory=LoRAConfig)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the base can be taught by."""
        return (*objectives_of(self.model), *taught_by(self.model))


def taught_by(model: ModelConfig) -> tuple[Objective, ...]:
    """The objectives of fine-tuning alone that a kind of model can be taught by."""
    decodes: tuple[Objective, ...] = ("answers",) if "causal_lm" in objectives_of(model) else ()
    judges: tuple[Objective, ...] = ("classification",) if isinstance(model, TransformerConfig) else ()
    return decodes + judges
