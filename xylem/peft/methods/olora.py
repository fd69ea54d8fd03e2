"""O-LoRA (2310.14152): a task is learned by a pair in a subspace that those of earlier tasks leave free.

The base holds the earlier tasks' pairs, which stay as they are; the new one stands on top of them, and the loss has its
overlap with them added (``peft/continual.py``).
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.leaves import LowRank
from xylem.peft import continual
from xylem.peft.config import OLoRAConfig
from xylem.peft.methods import lora
from xylem.peft.tree import Tree, matrices


def graft(params: Tree, key: PRNGKeyArray, config: OLoRAConfig) -> Tree:
    """The tree with pairs beside the targets, as LoRA's, on top of those that are there.

    Raises:
        ConfigError: no target has a pair of an earlier task.
    """
    if not any(isinstance(weight, LowRank) for weight in matrices(params, config.targets).values()):
        allowed = "none of them holds an earlier task's pair: begin with what --method lora made of the first task"
        raise ConfigError("method.targets", config.targets, allowed)
    return lora.graft(params, key, config)


def penalty(params: Tree, config: OLoRAConfig) -> jax.Array | Any:
    """What the loss has added: the weighted overlap with the earlier pairs."""
    return config.penalty * continual.overlap(params)
