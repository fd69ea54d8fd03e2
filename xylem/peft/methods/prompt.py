"""Prompt tuning (2104.08691): a few rows of embeddings in front of every text learn, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.leaves import take
from xylem.models.stack import runs
from xylem.peft.config import PromptConfig
from xylem.peft.tree import Predicate, Tree, check_absent


def graft(params: Tree, key: PRNGKeyArray, config: PromptConfig) -> Tree:
    """The tree with a prompt: ``prompt/embedding``, begun as embeddings of real tokens (section 3.2).

    Raises:
        ConfigError: an id that the table lacks, a network that reads no virtual tokens, or that has a prompt already.
    """
    check_absent(params, "prompt", "prompt")
    trunk = params.get("encoder", params)
    if "embed" not in params or not any({"attention", "mixer"} & set(trunk[name]) for name in runs(trunk)):
        raise ConfigError("method", "prompt", "transformers and Mamba read virtual tokens, this network does not")
    table = params["embed"]["embedding"]
    if config.ids:
        if not all(0 <= token < table.shape[0] for token in config.ids):
            raise ConfigError("ids", config.ids, f"they must be below {table.shape[0]}")
        ids = jnp.resize(jnp.asarray(config.ids), (config.length,))
    else:
        ids = jax.random.randint(key, (config.length,), 0, table.shape[0])
    return {**params, "prompt": {"embedding": take(table, ids)}}


def trainable(params: Tree, config: PromptConfig) -> Predicate:
    """The prompt."""
    return lambda path, _: path == "prompt/embedding"
