"""LoRAHub (2307.13269): a few examples of a new task choose how LoRAs of other tasks are mixed; nothing is trained.

A = sum w_i A_i,  B = sum w_i B_i                 each on its own (sail-sg/lorahub, algorithm.py), not sum w_i A_i B_i
minimise  loss(w) + 0.05 mean |w|,  w in [-1.5, 1.5] from 0, without gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import optimize

from xylem.errors import ConfigError
from xylem.models.conversion import flatten
from xylem.models.leaves import LowRank, is_leaf
from xylem.peft.tree import Tree

PENALTY, BOUND = 0.05, 1.5  # sail-sg/lorahub, algorithm.py: default_l1_regularization, lorahub_learning
BUDGET = 40  # the paper's steps, for 20 adapters


def combine(adapters: Sequence[Tree], weights: Sequence[float] | np.ndarray | Float[Array, "n"]) -> Tree:
    """One LoRA of several of the same base, rank and targets: A and B are weighted sums, apart from each other.

    Raises:
        ConfigError: they differ in more than the numbers in their pairs, or there is not one weight for each.
    """
    if not adapters or len(weights) != len(adapters):
        raise ConfigError("weights", list(weights), f"one for each of the {len(adapters)} adapters, at least one")
    flats = [flatten(each) for each in adapters]
    shapes = [{path: _outline(leaf) for path, leaf in flat.items()} for flat in flats]
    for index, own in enumerate(shapes):
        if odd := sorted(path for path in own.keys() | shapes[0].keys() if own.get(path) != shapes[0].get(path)):
            raise ConfigError(f"adapters[{index}]", odd[0], "targets, rank and scale as in the first one")
    w = jnp.asarray(weights, jnp.float32)

    def mixed(*xs: Array) -> Array:
        return sum(w[i].astype(x.dtype) * x for i, x in enumerate(xs))  # type: ignore[return-value]

    def one(leaf: LowRank | Array, *others: LowRank | Array) -> LowRank | Array:
        if not isinstance(leaf, LowRank):
            return leaf
        pairs = [leaf, *(each for each in others if isinstance(each, LowRank))]
        return leaf.replace(a=mixed(*(p.a for p in pairs)), b=mixed(*(p.b for p in pairs)))  # type: ignore[attr-defined]

    return jax.tree.map(one, *adapters, is_leaf=is_leaf)


def _outline(leaf: object) -> tuple:
    """What two adapters must have in common at a place."""
    if not isinstance(leaf, LowRank):
        return (jax.tree.map(jnp.shape, leaf),)
    return leaf.a.shape, leaf.b.shape, *np.asarray(leaf.scale).ravel().tolist()


def objective(loss: float, weights: np.ndarray) -> float:
    """What is minimised: the loss, and a reason to leave out what does not help."""
    return float(loss) + PENALTY * float(np.abs(weights).mean())


def search(loss: Callable[[Tree], float], adapters: Sequence[Tree], budget: int = BUDGET) -> tuple[np.ndarray, Tree]:
    """``(weights, params)``: the best mixture that ``budget`` evaluations of ``loss(params)`` find.

    By Powell's COBYLA (SciPy), which begins with 0 and each adapter alone, so that with a budget above their number
    the mixture is no worse than the best of them; the paper takes Nevergrad's NGOpt.

    Raises:
        ConfigError: a budget of less than two evaluations more than there are adapters.
    """
    if budget < len(adapters) + 2:
        raise ConfigError("budget", budget, f"at least {len(adapters) + 2}: 0, each adapter alone, and a mixture")
    tried: list[tuple[float, np.ndarray]] = []

    def value(weights: np.ndarray) -> float:
        if len(tried) >= budget:  # COBYLA may ask for a few more
            return tried[-1][0]
        inside = np.clip(weights, -BOUND, BOUND)
        tried.append((objective(loss(combine(adapters, inside)), inside), inside.copy()))
        return tried[-1][0]

    bounds = optimize.Bounds(-BOUND, BOUND)
    options = {"maxiter": budget, "rhobeg": 1.0}
    optimize.minimize(value, np.zeros(len(adapters)), method="COBYLA", bounds=bounds, options=options)
    best = min(tried, key=lambda pair: pair[0])[1]
    return best, combine(adapters, best)
