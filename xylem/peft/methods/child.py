"""Child-tuning (2109.05687): the whole network learns, but of its gradients a part counts.

Nothing is added to the tree, and what was trained is saved whole: the method is a wrapper of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from xylem.errors import ConfigError
from xylem.models.conversion import flatten
from xylem.peft import tree
from xylem.peft.config import ChildConfig
from xylem.peft.tree import Predicate, Tree, matches


def graft(params: Tree, key: PRNGKeyArray, config: ChildConfig) -> Tree:
    """The tree itself.

    Raises:
        ConfigError: no weight competes for a ``fisher`` mask, by which all would learn.
    """
    if config.mask == "fisher" and not any(matches(config.targets, path) for path in flatten(params)):
        raise ConfigError("targets", config.targets, f"it must find some of {', '.join(flatten(params))}")
    return params


def trainable(params: Tree, config: ChildConfig) -> Predicate:
    """Everything."""
    return lambda path, _: True


class Drawn(NamedTuple):
    """Key data for the masks to come, and the state of the optimizer within."""

    rng: UInt32[Array, "..."] | Any
    inner: Any


class Masked(NamedTuple):
    """Which weights learn, and the state of the optimizer within."""

    mask: Any
    inner: Any


def optimizer(inner: optax.GradientTransformation, config: ChildConfig, steps: int) -> optax.GradientTransformation:
    """``inner``, given a part of the gradients.

    ``random`` draws which, anew in each step, and divides them by their share, so that their mean is the gradient; all
    weights go on moving by what their moments remember. With ``fisher`` what lies outside the mask never moves, by
    weight decay neither: the official AdamW decays it. The mask is part of the state and is restored with it; nothing
    learns before ``chosen`` has put one there.
    """
    if config.mask == "fisher":
        return _masked(inner)

    def init(params: Any) -> Any:
        return Drawn(jax.random.key_data(jax.random.key(config.seed)), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        key, own = jax.random.split(jax.random.wrap_key_data(state.rng))
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(own, len(leaves))
        drawn = [jax.random.bernoulli(k, config.share, x.shape) for k, x in zip(keys, leaves, strict=True)]
        counted = [jnp.where(keep, x / config.share, 0.0) for keep, x in zip(drawn, leaves, strict=True)]
        updates, within = inner.update(jax.tree.unflatten(structure, counted), state.inner, params)
        return updates, Drawn(jax.random.key_data(key), within)

    return optax.GradientTransformation(init, update)


def chosen(state: Any, mask: Tree) -> Any:
    """An optimizer's state with ``mask`` (of ``fisher_mask``) as what learns, lying where the one before it lay."""
    masked = lambda part: isinstance(part, Masked)  # noqa: E731

    def put(part: Any) -> Any:
        if not masked(part):
            return part
        return part._replace(mask=jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), part.mask, mask))

    return jax.tree.map(put, state, is_leaf=masked)


def _masked(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on the weights of a mask; gradients are masked for the moments' sake, updates for all the rest's."""
    only = lambda values, mask: jax.tree.map(lambda x, keep: jnp.where(keep, x, 0.0), values, mask)  # noqa: E731

    def init(params: Any) -> Any:
        return Masked(jax.tree.map(lambda x: jnp.zeros(x.shape, bool), params), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, within = inner.update(only(updates, state.mask), state.inner, params)
        return only(updates, state.mask), Masked(state.mask, within)

    return optax.GradientTransformation(init, update)


def fisher_mask(gradients: Iterable[Tree], config: ChildConfig) -> Tree:
    """Which weights have the largest Fisher information, from the gradients of some batches: booleans, as a tree.

    The information is the mean over batches of the squared gradient (equation 6), that of each matrix of each layer
    clipped before. The largest ``config.share`` is taken of all targets together; weights that are none all learn.
    """
    total, count = None, 0
    for each in gradients:
        squares = _squares(each, config.clip_norm)
        total, count = squares if total is None else jax.tree.map(jnp.add, total, squares), count + 1
    if total is None:
        raise ValueError("fisher_mask: gradients of at least one batch are wanted")
    competes = lambda path, _: matches(config.targets, path)  # noqa: E731
    some, others = tree.partition(jax.tree.map(lambda x: x / count, total), competes)
    size = sum(x.size for x in jax.tree.leaves(some))
    # As many as lie at or above NumPy's percentile of 100 (1 - share).
    bits = _threshold(some, size - math.ceil((size - 1) * (1 - config.share)))
    best = jax.tree.map(lambda x: _bits(x) >= bits, some)
    return tree.combine(best, jax.tree.map(lambda x: jnp.ones(x.shape, bool), others))


@jax.jit
def _squares(gradients: Tree, clip_norm: Any) -> Tree:
    """Squared gradients, each matrix of each layer scaled down to a norm before (torch's clip_grad_norm_)."""

    def square(gradient: Array) -> Array:
        gradient = gradient.astype(jnp.float32)
        return jnp.square(gradient * jnp.minimum(1.0, clip_norm / (jnp.linalg.norm(gradient.ravel()) + 1e-6)))

    by_layer = tree.per_layer(lambda part: jax.tree.map(square, part))
    return tree.join(by_layer(tree.parts(gradients)))


def _bits(x: Array) -> Int[Array, "..."]:
    """The bits of floats that are not negative, which are ordered as the floats are."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


@jax.jit
def _above(values: Tree, bits: Any) -> list[Array]:
    return [jnp.sum(_bits(x) >= bits) for x in jax.tree.leaves(values)]


def _threshold(values: Tree, wanted: int) -> int:
    """The largest bits that ``wanted`` of the values reach, by bisection: nothing is gathered or sorted."""
    low, high = 0, int(_bits(jnp.float32(jnp.inf)))
    while low < high:
        middle = (low + high + 1) // 2
        # Added up as Python's integers: a network may have more weights than 32 bits count.
        enough = sum(map(int, _above(values, middle))) >= wanted
        low, high = (middle, high) if enough else (low, middle - 1)
    return low
