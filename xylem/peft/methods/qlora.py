"""QLoRA (2305.14314): LoRA beside a frozen base of four bits, or eight, decoded one layer at a time.

The base is rounded once, when the graft is made; adapters learn on top of what it was rounded to. So ``merge`` adds
them to the decoded base, and nothing rounds the sum to four bits again: ``unmerge`` and a second graft refuse to.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.leaves import Leaf, Quantized
from xylem.models.quantized import quantize4
from xylem.peft.config import LINEAR, QLoRAConfig
from xylem.peft.methods import lora
from xylem.peft.tree import Predicate, Tree, matches, rewrite


def graft(params: Tree, key: PRNGKeyArray, config: QLoRAConfig) -> Tree:
    """The tree with low-rank pairs beside the targets, those inside layers quantized; tables and head stay as they are.

    The network computes what it does with the quantized matrices decoded, to the bit.

    Raises:
        ConfigError: a target is no plain array.
    """

    def beside(path: str, weight: Any, key: PRNGKeyArray) -> Leaf:
        return lora.pair(path, quantize(path, weight, config) if matches(LINEAR, path) else weight, key, config)

    return rewrite(params, config.targets, beside, key)


def quantize(path: str, weight: Any, config: QLoRAConfig) -> Leaf:
    """The weight in the type the config names.

    Raises:
        ConfigError: it is no plain array.
    """
    if isinstance(weight, Leaf):
        allowed = f"{path} is grafted or quantized already; merge it first, if it shall be rounded once more"
        raise ConfigError("targets", config.targets, allowed)
    if config.kind == "int8":
        return Quantized.quantize(weight)
    return quantize4(weight, config.kind, config.statistics, config.block, config.group)


def trainable(params: Tree, config: QLoRAConfig) -> Predicate:
    """A and B."""
    return lora.trainable(params, config)
