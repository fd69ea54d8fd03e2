"""LoRA (2106.09685): a frozen weight W learns as W + scale A B, A of ``rank`` columns and B of as many rows.

Three variants are settings: rsLoRA's scale (2312.03732), LoRA+'s learning rates (2402.12354), and DoRA (2402.09353),
which learns the length of every column of the sum apart from its direction (``dora.py``).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from xylem.models.leaves import LowRank
from xylem.peft.config import LoRAConfig
from xylem.peft.tree import Predicate, Tree, beside, rewrite
from xylem.sharding import path_name


def graft(params: Tree, key: PRNGKeyArray, config: LoRAConfig) -> Tree:
    """The tree with low-rank pairs beside the targets; the network computes what it did, to the bit."""
    return rewrite(params, config.targets, lambda path, weight, key: pair(path, weight, key, config), key)


def pair(path: str, weight: Any, key: PRNGKeyArray, config: LoRAConfig) -> LowRank:
    """A weight with its pair. Of a table, whose rows are looked up, A is zero and B drawn (microsoft/LoRA, layers.py):
    every row then has a gradient of its own from the first step."""
    *layers, rows, columns = weight.shape
    size, stored = (*layers, rows, config.rank), weight.dtype
    a, b = jnp.zeros(size, stored), jnp.zeros((*layers, config.rank, columns), stored)
    if path.endswith("/embedding"):
        b = jax.random.normal(key, b.shape, stored)
    elif config.init == "kaiming":
        bound = rows**-0.5
        a = jax.random.uniform(key, size, stored, -bound, bound)
    else:
        a = config.rank**-0.5 * jax.random.normal(key, size, stored)
    return LowRank(base=weight, a=a, b=b, scale=jnp.full(layers, config.scale, stored))


def trainable(params: Tree, config: LoRAConfig) -> Predicate:
    """A and B of the targets; where the base holds pairs already, those on top."""
    return lambda path, _: beside(path, config.targets, ("a", "b"))


def optimizer(inner: optax.GradientTransformation, config: LoRAConfig, steps: int) -> optax.GradientTransformation:
    """``inner``, by which B moves ``config.rate_ratio`` times as far (LoRA+ 2402.12354, section 4.2).

    A table's B is drawn and its A zero; it keeps the common rate (nikhil-ghosh-berkeley/loraplus, lora_plus.py).
    """
    if config.rate_ratio == 1.0:
        return inner

    def scaled(path: Any, update: Any) -> Any:
        name = path_name(path)
        return config.rate_ratio * update if name.endswith("/b") and "embedding/" not in name else update

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(inner.init, update)
