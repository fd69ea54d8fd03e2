"""BitFit (2106.10199): the biases learn, those of norms included, and nothing else."""

from __future__ import annotations

import re

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.conversion import flatten, unflatten
from xylem.peft.config import LINEAR, BitFitConfig
from xylem.peft.tree import Predicate, Tree, matrices


def graft(params: Tree, key: PRNGKeyArray, config: BitFitConfig) -> Tree:
    """The tree itself, or with biases of zero where there were none.

    Raises:
        ConfigError: there is no bias to learn, and none is to be added.
    """
    if config.missing == "add":
        added = {}
        for path, weight in matrices(params, LINEAR).items():
            *layers, _, columns = weight.shape
            added[path.removesuffix("kernel") + "bias"] = jnp.zeros((*layers, columns), weight.dtype)
        return unflatten(added | flatten(params))
    if not any(map(is_bias, flatten(params))):
        raise ConfigError("missing", config.missing, 'this network has no biases; "add" gives it some', ["add"])
    return params


def trainable(params: Tree, config: BitFitConfig) -> Predicate:
    """The biases inside layers and of norms; a head's are the head's."""
    return lambda path, _: is_bias(path)


def is_bias(path: str) -> bool:
    """Whether a weight is a bias of the trunk."""
    inside = re.search(r"(^|/)(layers|lstm)(_\d+)?/|norm/", path) is not None
    return path.endswith("/bias") and inside and "_adapter/" not in path
