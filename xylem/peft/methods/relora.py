"""ReLoRA (2307.05695): LoRA whose pairs are moved into the frozen weights now and then, and begin anew.

Each restart adds a sum of low rank, so what all of them have learned together is of higher rank than any. The learning
rate falls to zero at a restart and comes back (section 3.2, "jagged cosine"), and nearly all of the pairs' moments are
forgotten, for they point to where the old pairs were.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.leaves import is_leaf
from xylem.peft.config import ReLoRAConfig
from xylem.peft.methods import lora
from xylem.peft.tree import Predicate, Tree, combine, matrices, rewrite
from xylem.sharding import path_name


def graft(params: Tree, key: PRNGKeyArray, config: ReLoRAConfig) -> Tree:
    """The tree with low-rank pairs beside the targets, as LoRA's.

    Raises:
        ConfigError: a target is no plain array, into which a pair could be moved.
    """
    for path, weight in matrices(params, config.targets).items():
        if is_leaf(weight):
            raise ConfigError("targets", config.targets, f"plain arrays alone take a pair in; {path} is none")
    return lora.graft(params, key, config)


def trainable(params: Tree, config: ReLoRAConfig) -> Predicate:
    """A and B, and all that is no target where ``others`` learn."""
    if config.others == "frozen":
        return lora.trainable(params, config)
    # By the path alone: of a tree read from a file, whose leaves are dictionaries, as of one with leaves.
    return lambda path, _: not path.endswith(("kernel/base", "kernel/scale", "embedding/base", "embedding/scale"))


def saved(params: Tree, config: ReLoRAConfig) -> Predicate:
    """What learns, and the targets' own weights: restarts have changed them."""
    learns = trainable(params, config)
    return lambda path, weight: learns(path, weight) or path.endswith("/base")


def restart(state: Any, key: PRNGKeyArray, config: ReLoRAConfig) -> Any:
    """A TrainState whose pairs have been added to their bases and drawn anew; its network computes what it did.

    Of the pairs' weights ``config.prune``, drawn at random, lose their moments: arrays of the optimizer's state whose
    path ends in the pair's and that have its shape. Guitaricet/relora (torchrun_main.py) draws for first and second
    moments apart; but A has no gradient while B is zero, and a first moment alone would then be divided by epsilon.
    Of the moving average the pairs begin anew too: the old ones belong to other bases. All else stays as it is.
    """
    drawing, pruning = jax.random.split(key)
    begin = lambda path, leaf, key: lora.pair(path, leaf.materialize(), key, config)  # noqa: E731
    params = rewrite(combine(state.trainable, state.frozen), config.targets, begin, drawing)
    changed = {"trainable": _where_held(state.trainable, params), "frozen": _where_held(state.frozen, params)}
    if state.ema is not None:
        # A copy: the two are donated together, and one buffer cannot be given away twice.
        anew = lambda path, old, new: jnp.copy(new) if path_name(path).endswith(("/a", "/b")) else old  # noqa: E731
        changed["ema"] = jax.tree_util.tree_map_with_path(anew, state.ema, changed["trainable"])
    return state.replace(optimizer=_pruned(state, pruning, config.prune), **changed)


def due(step: Int[Array, ""] | int, config: ReLoRAConfig) -> Bool[Array, ""] | bool:
    """Whether a restart comes before a step: that is one whose learning rate is zero.

    A loop asks this of the step it counts and calls ``restart`` as a program of its own: as a condition inside the
    step it would cost a copy of the state each time.
    """
    return (step > 0) & (step % config.every == 0)


def schedule(config: ReLoRAConfig, steps: int, peak: float, warmup: int, floor: float) -> optax.Schedule:
    """The jagged cosine: from ``peak`` to ``floor`` times that, and back up from zero after each restart.

    While it comes up, its aim is the cosine at ``restart / (steps - warmup)``, not counted from the warm-up's end as
    elsewhere (Guitaricet/relora, training_utils.py, _get_cosine_schedule_with_multiple_warmups_lambda).
    """
    rest = max(1, steps - warmup)

    def rate(step: Any) -> Any:
        cosine = lambda done: floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done / rest))  # noqa: E731
        into = step % config.every
        rising = into / max(1, config.rewarm) * cosine(step - into)
        later = jnp.where(into < config.rewarm, rising, cosine(step - warmup))
        return peak * jnp.where(step < warmup, step / max(1, warmup), later)

    return rate


def _where_held(part: Tree, whole: Tree) -> Tree:
    """The values of ``whole`` where ``part`` has some."""
    return jax.tree.map(lambda old, new: None if old is None else new, part, whole, is_leaf=lambda x: x is None)


def _pruned(state: Any, key: PRNGKeyArray, share: float) -> Any:
    """The optimizer's state, a share of the pairs' weights without moments."""
    named = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(state.trainable)]
    pairs = {name: x.shape for name, x in named if name.endswith(("/a", "/b"))}
    keys = dict(zip(pairs, jax.random.split(key, len(pairs)), strict=True))

    def prune(path: Any, x: Any) -> Any:
        words = path_name(path).split("/")
        suffixes = ("/".join(words[start:]) for start in range(len(words)))
        name = next((suffix for suffix in suffixes if pairs.get(suffix) == x.shape), None)
        return x if name is None else jnp.where(jax.random.bernoulli(keys[name], share, x.shape), 0.0, x)

    return jax.tree_util.tree_map_with_path(prune, state.optimizer)
