"""From a grafted tree back to plain arrays, and from those to the graft again."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from xylem.models.conversion import flatten
from xylem.models.leaves import is_leaf, materialize, with_biases
from xylem.peft.tree import Tree

# Nodes that a plain network has no place for.
NODES = ("_adapter", "prefix", "prompt", "start")


def merge(params: Tree) -> Tree:
    """The same network as a tree of plain arrays: every leaf's weight, its graft included.

    Raises:
        ValueError: the tree holds nodes that no weight can take in: adapters, prefixes, prompts, states to begin with.
    """
    held = sorted({path for path in flatten(params) if any(word.endswith(NODES) for word in path.split("/"))})
    if held:
        what = "adapters, prefixes, prompts and states to begin with are no part of a weight"
        raise ValueError(f"merge: {what}; the tree holds {held[0]}")
    return materialize(params)


def merge_error(logits: Callable[[Tree], Array], params: Tree) -> float:
    """How far ``merge`` moves what a network computes: the largest change of a logit over the largest logit.

    Rounding alone: a merged weight is a sum in the type of the base, which in bfloat16 loses most of a small graft. A
    quantized base is decoded for it, so its rounding is in both and shows in neither.
    """
    merged, apart = logits(merge(params)), logits(params)
    return float(jnp.max(jnp.abs(merged - apart)) / jnp.max(jnp.abs(apart)))


def unmerge(merged: Tree, grafted: Tree) -> Tree:
    """The tree ``grafted`` once was, its bases taken from ``merged``, a tree that ``merge`` made of it.

    Within rounding: (W + D) - D. Raises ValueError for a leaf that cannot tell.
    """
    undo = lambda leaf, weight: leaf.rebase(weight) if is_leaf(leaf) else weight  # noqa: E731
    back = jax.tree.map(undo, grafted, merged, is_leaf=is_leaf)
    # What is done to a bias is linear in it, element by element.
    return with_biases(back, lambda leaf, bias: bias / leaf.beside(jnp.ones_like(bias)))
