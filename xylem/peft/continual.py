"""One task after another: a plug-in for each, a router that knows whose text it reads, and O-LoRA where one must serve.

A plug-in is a graft on the frozen base, trained on its task alone: nothing that comes later can change it, and
forgetting is zero by construction. Which one a text needs, the nearest centroid of the base's own states says:

    centres = centroids([features(module, base, *texts) for texts in tasks])
    ids = route(centres, features(module, base, *unknown))
    params = slora.assign(slora.stack(base, plugins), ids)                  each row by its own plug-in, in one batch

Where all tasks share one network instead, O-LoRA (2310.14152) grafts a new pair on the last tasks' frozen ones
(``peft.olora`` of a grafted tree), trains what ``newest`` finds, and adds ``overlap`` to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xylem.models.conversion import flatten
from xylem.models.language_model import LanguageModel
from xylem.models.leaves import LowRank
from xylem.peft.tree import Tree


def features(
    module: LanguageModel, params: Tree, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None
) -> Float[Array, "B D"]:
    """The mean of a decoder's final states over the real tokens of each text (``segments`` not 0)."""
    out: Any = module.apply({"params": params}, tokens, segments=segments)
    real = jnp.ones(tokens.shape, bool) if segments is None else segments > 0
    real = real[..., None].astype(jnp.float32)
    return (real * out.hidden.astype(jnp.float32)).sum(1) / jnp.maximum(real.sum(1), 1)


def centroids(tasks: Sequence[Float[Array, "_ D"]]) -> Float[Array, "tasks D"]:
    """The mean of each task's features. A task that comes later adds a row and changes none."""
    return jnp.stack([each.mean(0) for each in tasks])


def route(centres: Float[Array, "tasks D"], texts: Float[Array, "B D"]) -> Int[Array, "B"]:
    """For each text the task whose centroid is nearest."""
    return jnp.argmin(jnp.square(texts[:, None] - centres[None]).sum(-1), axis=1).astype(jnp.int32)


def accuracy(centres: Float[Array, "tasks D"], tasks: Sequence[Float[Array, "_ D"]]) -> float:
    """The share of texts, features of each task in order, that are sent to their own."""
    right = [int((route(centres, each) == task).sum()) for task, each in enumerate(tasks)]
    return sum(right) / sum(each.shape[0] for each in tasks)


def newest(path: str, _: Any) -> bool:
    """The predicate of what O-LoRA trains: the outermost A and B, not those of earlier tasks beneath."""
    return path.endswith(("/a", "/b")) and "/base/" not in path


def overlap(params: Tree) -> Float[Array, ""]:
    """The sum of |A_old^T A_new| over all pairs of a column of an earlier task's A and one of the newest's.

    As in the paper's code (cmnfriend/O-LoRA, uie_trainer_lora.py), which takes magnitudes where the paper squares.
    """
    total = jnp.zeros(())
    for leaf in flatten(params).values():
        old = leaf.base if isinstance(leaf, LowRank) else None
        while isinstance(leaf, LowRank) and isinstance(old, LowRank):
            total = total + jnp.abs(jnp.einsum("...ir,...is->...rs", old.a, leaf.a)).sum().astype(jnp.float32)
            old = old.base
    return total
