"""AdaLoRA (2303.10512): triplets of a column, a value and a row, of which training keeps the most important ones.

W' = W + scale P diag(values) Q     (equation 3; here P is ``a`` and Q is ``b``: kernels are (in, out))

After each step every triplet of every layer and matrix is scored, and those outside a falling budget lose their value;
it goes on learning and may come back until the choice stands. That is a wrapper of the optimizer, so nothing needs to
be called by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.leaves import Grafted, LowRank
from xylem.peft.config import AdaLoRAConfig
from xylem.peft.tree import Predicate, Tree, beside, rewrite

STD = 0.02  # of P and Q (QingruZhang/AdaLoRA, loralib/adalora.py, reset_parameters)


@struct.dataclass
class Triplets(Grafted):
    """``base + scale * a @ diag(values) @ b`` without ever forming it."""

    base: Any
    a: Float[Array, "*L I R"] | Any
    values: Float[Array, "*L R"] | Any
    b: Float[Array, "*L R O"] | Any
    scale: Float[Array, "*L"] | Any

    def pair(self) -> LowRank:
        """The same weight as a pair, the values multiplied into ``a``."""
        return LowRank(self.base, self.a * self.values[..., None, :], self.b, self.scale)

    def einsum(self, equation: str, x: Array) -> Array:
        return self.pair().einsum(equation, x)

    def take(self, ids: Int[Array, "..."]) -> Array:
        return self.pair().take(ids)

    def materialize(self) -> Array:
        return self.pair().materialize()

    def rebase(self, weight: Array) -> Triplets:
        return self.replace(base=self.pair().rebase(weight).base)  # type: ignore[attr-defined]

    def specs(self, weight_spec: PartitionSpec) -> Triplets:
        pair = LowRank(self.base, self.a, self.b, self.scale).specs(weight_spec)
        return Triplets(pair.base, pair.a, PartitionSpec(*pair.scale, None), pair.b, pair.scale)


def graft(params: Tree, key: PRNGKeyArray, config: AdaLoRAConfig) -> Tree:
    """The tree with triplets of value zero beside the targets; the network computes what it did, to the bit."""

    def triplets(path: str, weight: Any, key: PRNGKeyArray) -> Triplets:
        *layers, rows, columns = weight.shape
        first, second = jax.random.split(key)
        return Triplets(
            base=weight,
            a=STD * jax.random.normal(first, (*layers, rows, config.rank), weight.dtype),
            values=jnp.zeros((*layers, config.rank), weight.dtype),
            b=STD * jax.random.normal(second, (*layers, config.rank, columns), weight.dtype),
            scale=jnp.full(layers, config.alpha / (config.rank + 1e-5), weight.dtype),
        )

    return rewrite(params, config.targets, triplets, key)


def trainable(params: Tree, config: AdaLoRAConfig) -> Predicate:
    """P, Q and the values."""
    return lambda path, _: beside(path, config.targets, ("a", "b", "values"))


def penalty(params: Tree, config: AdaLoRAConfig) -> Float[Array, ""]:
    """The mean of |P' P - I| and |Q Q' - I| over all matrices of all layers, times ``config.penalty``.

    Equation 4 squares the norms; both codes take them as they are, and their mean (QingruZhang/AdaLoRA,
    loralib/adalora.py, compute_orth_regu; huggingface/peft, adalora/model.py).
    """
    distances = []
    for each in _triplets(params):
        for factor in (each.a.mT, each.b):
            square = (factor @ factor.mT).astype(jnp.float32)
            gap = square - jnp.broadcast_to(jnp.eye(square.shape[-1]), square.shape)
            distances.append(optax.safe_norm(gap, 0.0, axis=(-2, -1)).ravel())
    return config.penalty * jnp.concatenate(distances).mean()


def schedule(config: AdaLoRAConfig, steps: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, int]:
    """How many values may stay after each of the steps 0 to ``steps``, after which they are chosen, and the last such.

    The budget is ``first``, then comes down to ``last`` along a cubic (equation 12), then stands.

    Raises:
        ConfigError: so few steps that warm-up and settling meet.
    """
    start, end = round(config.warmup * steps), steps - round(config.settle * steps)
    if end <= start:
        allowed = f"of {steps} steps none would be left between warmup = {config.warmup} and it"
        raise ConfigError("method.settle", config.settle, allowed)
    budgets, chosen = np.full(steps + 1, first), np.zeros(steps + 1, bool)
    for step in range(start + 1, steps + 1):
        left = max(0.0, 1 - (step - start) / (end - start))
        budgets[step] = int((first - last) * left**3 + last)
        chosen[step] = step == end or (step < end and step % config.every == 0)
    return budgets, chosen, end


class Allocation(NamedTuple):
    """What the allocation of values remembers, and the state of the optimizer within.

    Attributes:
        step: updates made.
        sensitivity: moving average of |weight x gradient|, of P, Q and values (equation 9).
        uncertainty: moving average of how far that is from its average (equation 10).
        kept: which values stay.
    """

    step: Int[Array, ""] | Any
    sensitivity: Any
    uncertainty: Any
    kept: Any
    inner: Any


def optimizer(inner: optax.GradientTransformation, config: AdaLoRAConfig, steps: int) -> optax.GradientTransformation:
    """``inner``, behind whose update values outside the budget are set to zero, across all layers and matrices.

    Sensitivity is that of the weights after the update and the gradient before it, as in both codes (algorithm 1 takes
    the weights before it). Gradients are taken as ``inner`` gets them: clipping belongs in front of this.
    """

    def init(params: Any) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), _only(params))
        kept = jax.tree.map(lambda each: jnp.ones(each.values.shape, bool), zeros, is_leaf=_is_triplets)
        # A copy: the two are donated together, and one buffer cannot be given away twice.
        return Allocation(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), kept, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        values = [each.values for each in _triplets(params)]
        matrices = sum(x.size // x.shape[-1] for x in values)
        budgets, chosen, end = schedule(config, steps, sum(x.size for x in values), config.target * matrices)
        gradients = updates
        updates, within = inner.update(gradients, state.inner, params)
        step = state.step + 1
        at = jnp.minimum(step, steps)  # a run that goes on keeps its choice
        moved: Any = optax.apply_updates(params, updates)
        smoothed = _smoothed(state, _only(moved), _only(gradients), config)
        keep_old = lambda new, old: jnp.where(step < end, new, old)  # noqa: E731
        sensitivity, uncertainty = jax.tree.map(keep_old, smoothed, (state.sensitivity, state.uncertainty))
        best = _best(jax.tree.map(jnp.multiply, sensitivity, uncertainty), jnp.asarray(budgets)[at])
        chooses = jnp.asarray(chosen)[at]
        kept = jax.tree.map(lambda new, old: jnp.where(chooses, new, old), best, state.kept)
        cuts = chooses | (step > end)

        def cut(change: Any, kept: Any, weight: Any) -> Any:
            if kept is None:
                return change
            # The weight's own negative: what is added up is zero to the bit.
            return change.replace(values=jnp.where(cuts & ~kept, -weight.values, change.values))

        here = lambda x: x is None or _is_triplets(x)  # noqa: E731
        updates = jax.tree.map(cut, updates, kept, params, is_leaf=here)
        return updates, Allocation(step, sensitivity, uncertainty, kept, within)

    return optax.GradientTransformation(init, update)


def _smoothed(state: Allocation, weights: Tree, gradients: Tree, config: AdaLoRAConfig) -> tuple[Tree, Tree]:
    """The moving averages with one more step (equations 8 to 10)."""
    slope = lambda weight, gradient: jnp.abs(weight.astype(jnp.float32) * gradient)  # noqa: E731
    now = jax.tree.map(slope, weights, gradients)
    mix = lambda beta: lambda old, new: beta * old + (1 - beta) * new  # noqa: E731
    sensitivity = jax.tree.map(mix(config.beta1), state.sensitivity, now)
    away = jax.tree.map(lambda new, mean: jnp.abs(new - mean), now, sensitivity)
    return sensitivity, jax.tree.map(mix(config.beta2), state.uncertainty, away)


def _best(importance: Tree, budget: Int[Array, ""]) -> Tree:
    """Which triplets are among the ``budget`` best of the whole network, a (layer, triplet) array a matrix.

    A triplet counts as its value and the means of its column and its row (equation 7). Of equal ones the first stay.
    """
    found, structure = jax.tree.flatten(importance, is_leaf=_is_triplets)
    scores = [each.values + each.a.mean(-2) + each.b.mean(-1) for each in found]
    flat = jnp.concatenate([score.ravel() for score in scores])
    place = jnp.argsort(jnp.argsort(flat, descending=True))
    ends = np.cumsum([score.size for score in scores])[:-1]
    kept = [part.reshape(score.shape) for part, score in zip(jnp.split(place < budget, ends), scores, strict=True)]
    return jax.tree.unflatten(structure, kept)


def _is_triplets(value: Any) -> bool:
    return isinstance(value, Triplets)


def _learn(value: Any) -> bool:
    """Whether triplets learn: those of an earlier task, on a matrix that is no target now, are left out."""
    return _is_triplets(value) and value.values is not None


def _triplets(params: Tree) -> list[Triplets]:
    return [x for x in jax.tree.leaves(params, is_leaf=_is_triplets) if _learn(x)]


def _only(params: Tree) -> Tree:
    """What is scored, None in place of all else."""
    keep = lambda x: x.replace(base=None, scale=None) if _learn(x) else None  # noqa: E731
    return jax.tree.map(keep, params, is_leaf=_is_triplets)
