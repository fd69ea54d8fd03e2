"""Arithmetic on what was learned: task vectors (2212.04089), TIES (2306.01708) and DARE (2311.03099).

    one, other = difference(lora_one, base), difference(lora_other, base)
    params = apply(base, ties([one, other], density=0.2))           a plain network that has learned both
    params = apply(base, negate(one))                               one that has unlearned a task

A task vector is a dictionary, path -> what is added to the weight there. Any method that merges has one; where nothing
was learned there is no entry, which counts as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.conversion import flatten, unflatten
from xylem.models.leaves import LowRank, Quantized, plain
from xylem.models.quantized import Quantized4
from xylem.peft.merging import merge
from xylem.peft.tree import Tree, unsplit

Vector = dict[str, Array]


def difference(tuned: Tree, base: Tree) -> Vector:
    """What ``tuned``, a grafted or a plain tree, adds to the weights of ``base``; where it adds nothing, no entry.

    Raises:
        ConfigError: the two do not have the same weights.
        ValueError: it has grown nodes that are no part of a weight (``merging.merge``).
    """
    made = flatten(unsplit(merge(tuned)))
    weights, grafted = flatten(unsplit(base)), flatten(tuned)
    if odd := sorted(set(weights) ^ set(made)):
        raise ConfigError("tuned", odd[0], "weights of the base, nothing more or less")
    found = {}
    for path, weight in weights.items():
        if isinstance(leaf := grafted.get(path), LowRank):
            found[path] = _pairs(leaf, weight)
        elif made[path] is not weight:
            found[path] = made[path] - plain(weight)
    return {path: delta for path, delta in found.items() if jnp.any(delta != 0)}


def _pairs(leaf: LowRank | Any, weight: Any) -> Array:
    """What pairs on pairs add to a weight: exactly, where (W + D) - W would round."""
    total = jnp.zeros(leaf.shape, leaf.dtype)
    while isinstance(leaf, LowRank) and leaf is not weight:
        total = total + LowRank(jnp.zeros(leaf.shape, leaf.dtype), leaf.a, leaf.b, leaf.scale).materialize()
        leaf = leaf.base
    rounded = isinstance(leaf, Quantized | Quantized4)  # that was not learned
    return total if leaf is weight or rounded else total + plain(leaf) - plain(weight)


def apply(base: Tree, vector: Vector, strength: float = 1.0) -> Tree:
    """Plain arrays: ``base + strength * vector``.

    Raises:
        ConfigError: the base lacks one of the weights.
    """
    weights = flatten(base)
    if unknown := sorted(set(vector) - set(weights)):
        raise ConfigError("vector", unknown[0], "the base has no such weight", list(weights))
    added = {path: plain(weight) + strength * vector[path] for path, weight in weights.items() if path in vector}
    return unflatten({path: plain(weight) for path, weight in weights.items()} | added)


def add(vectors: Sequence[Vector], weights: Sequence[float] | None = None) -> Vector:
    """The sum, each times its weight (1)."""
    weights = _weights(vectors, weights)
    return {path: _sum([w * x for w, x in zip(weights, xs, strict=True)]) for path, xs in _aligned(vectors).items()}


def negate(vector: Vector) -> Vector:
    """What unlearns a task."""
    return {path: -x for path, x in vector.items()}


def interpolate(one: Vector, other: Vector, share: float) -> Vector:
    """``(1 - share) * one + share * other``."""
    return add([one, other], [1.0 - share, share])


def ties(vectors: Sequence[Vector], weights: Sequence[float] | None = None, density: float = 0.2) -> Vector:
    """Trim, elect a sign, and average those that agree with it (2306.01708, section 4.1).

    Of each vector the fraction ``density`` of largest magnitude stays, over all weights together (the paper keeps a
    fifth). At each number the sign of the sum wins, and the mean is over those that have it, each times its weight.

    Raises:
        ConfigError: a density outside (0, 1], or not one weight for each vector.
    """
    _check_density(density)
    weights = _weights(vectors, weights)

    def elect(xs: list[Array]) -> Array:
        majority = jnp.where(_sum(xs) >= 0, 1, -1)
        agree = [jnp.sign(x) == majority for x in xs]
        total = _sum([jnp.where(kept, w * x, 0) for kept, w, x in zip(agree, weights, xs, strict=True)])
        return total / jnp.maximum(_sum([kept.astype(total.dtype) for kept in agree]), 1)

    return {path: elect(xs) for path, xs in _aligned([_trim(vector, density) for vector in vectors]).items()}


def dare(vector: Vector, key: PRNGKeyArray, density: float = 0.1) -> Vector:
    """Each number stays with probability ``density``, divided by it, so that the mean stays (2311.03099, section 3.1).

    The result is a vector as any other: several are summed by ``add`` or merged by ``ties``.

    Raises:
        ConfigError: a density outside (0, 1].
    """
    _check_density(density)
    keys = jax.random.split(key, len(vector))
    keep = lambda key, x: jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0)  # noqa: E731
    return {path: keep(own, vector[path]) for path, own in zip(sorted(vector), keys, strict=True)}


def _trim(vector: Vector, density: float) -> Vector:
    """Zeros but for the largest; all that equal the last one kept stay."""
    if not vector:
        return vector
    sizes = jnp.concatenate([jnp.abs(x).ravel() for x in vector.values()])
    kept = max(1, int(density * sizes.size))
    least = jnp.sort(sizes)[sizes.size - kept]
    return {path: jnp.where(jnp.abs(x) >= least, x, 0) for path, x in vector.items()}


def _aligned(vectors: Sequence[Vector]) -> dict[str, list[Array]]:
    """Path -> each vector's array there, zeros where it has none."""
    like = {path: x for vector in vectors for path, x in vector.items()}
    return {path: [v[path] if path in v else jnp.zeros_like(x) for v in vectors] for path, x in sorted(like.items())}


def _sum(xs: Sequence[Array]) -> Float[Array, "..."]:
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


def _weights(vectors: Sequence[Vector], weights: Sequence[float] | None) -> Sequence[float]:
    if not vectors or (weights is not None and len(weights) != len(vectors)):
        raise ConfigError("weights", weights, f"one for each of the {len(vectors)} vectors, at least one")
    return [1.0] * len(vectors) if weights is None else weights


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ConfigError("density", density, "the fraction that stays, in (0, 1]")
