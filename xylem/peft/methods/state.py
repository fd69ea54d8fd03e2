"""Initial state tuning (2410.09016): the states in which a Mamba begins every document learn, and nothing else.

What a prefix is to attention: a layer has read something before the text, though nobody wrote it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.conversion import flatten
from xylem.models.stack import runs
from xylem.peft.config import StateConfig
from xylem.peft.tree import Predicate, Tree, check_absent


def graft(params: Tree, key: PRNGKeyArray, config: StateConfig) -> Tree:
    """The tree with states of zero, ``mixer/start`` (L, Z, I), in every layer; the network computes what it did.

    Raises:
        ConfigError: a network without such states, or one in which they have learned already.
    """
    check_absent(params, "state", "start")
    names = [name for name in runs(params) if "mixer" in params[name]]
    if not names:
        attends = any("attention" in part for part in flatten(params))
        instead = "; attention has keys and values instead, which a prefix teaches" if attends else ""
        allowed = f"a Mamba has states to begin with that may learn{instead}"
        raise ConfigError("method", "state", allowed, ["prefix"] if attends else [])
    grown = dict(params)
    for name in names:
        mixer = params[name]["mixer"]
        grown[name] = {**params[name], "mixer": {**mixer, "start": jnp.zeros_like(mixer["A_log"].mT)}}
    return grown


def trainable(params: Tree, config: StateConfig) -> Predicate:
    """The states."""
    return lambda path, _: path.endswith("mixer/start")
