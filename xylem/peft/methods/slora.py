"""S-LoRA (2311.03285): one batch, every row with an adapter of its own, over one product with the base.

    pool = slora.stack(base, [adapter, other, ...])     adapters of mixed ranks, side by side
    params = slora.assign(pool, ids)                     row b of a batch is served by adapter ids[b]; -1 by none
    logits = module.apply({"params": params}, tokens)    tokens (B, T)

A pool and what ``assign`` makes of it are the same thing: a tree in which adapter n serves row n. ``assign`` copies the
adapters of a batch next to each other, once for a whole answer, so that no step has to gather them (the paper fetches
those of the running batch from host memory); rows that share an adapter hold it twice. Other ids, or an adapter in
another place of a pool, are the same program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from xylem.errors import ConfigError
from xylem.models.conversion import flatten, unflatten
from xylem.models.leaves import Grafted, LowRank, aligned, contract, is_leaf, take
from xylem.peft.tree import Tree

_FORWARD, _BACKWARD = {"...i,io->...o", "...d,dv->...v"}, {"...d,vd->...v"}  # x times the weight, or its transpose
_CELL = re.compile(r"(^|/)(cell|lstm_\d+)/")


@struct.dataclass
class BatchedLowRank(Grafted):
    """``base + a[n].T @ b[n]`` for row n of a batch.

    Inputs and outputs are the last axes of ``a`` and ``b``: ranks are small, and a TPU pads the last axis to 128. Lower
    ranks are filled up with zeros; ``b`` holds the scale.
    """

    base: Any
    a: Float[Array, "*L N R I"] | Any
    b: Float[Array, "*L N R O"] | Any

    def einsum(self, equation: str, x: Array) -> Array:
        """Raises ValueError for another number of rows than there are adapters, or for another product."""
        self._check(x.shape[0])
        if equation not in _FORWARD | _BACKWARD:
            raise ValueError(f"{equation!r}: a batch of adapters takes part in {sorted(_FORWARD | _BACKWARD)}")
        near, far = (self.a, self.b) if equation in _FORWARD else (self.b, self.a)
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        inner = jnp.einsum("nti,nri->ntr", flat, near.astype(x.dtype))
        outer = jnp.einsum("ntr,nro->nto", inner, far.astype(x.dtype))
        return contract(equation, x, self.base) + outer.reshape(*x.shape[:-1], outer.shape[-1])

    def take(self, ids: Int[Array, "N *T"]) -> Array:
        self._check(ids.shape[0])
        flat = ids.reshape(ids.shape[0], -1)
        rows = jax.vmap(lambda a, ids: jnp.take(a, ids, axis=1))(self.a, flat)
        outer = jnp.einsum("nrt,nro->nto", rows, self.b)
        return take(self.base, ids) + outer.reshape(*ids.shape, outer.shape[-1])

    def _check(self, rows: int) -> None:
        if rows != (adapters := self.a.shape[-3]):
            raise ValueError(f"{rows} rows, and adapters for {adapters}: slora.assign says which row has which")

    def materialize(self) -> Array:
        raise ValueError("slora: every row has a weight of its own; merge the adapter's own tree")

    def specs(self, weight_spec: PartitionSpec) -> BatchedLowRank:
        *layers, rows, columns = aligned(weight_spec, len(self.shape))
        base = self.base_specs(weight_spec)
        pair = (PartitionSpec(*layers, None, None, axis) for axis in (rows, columns))
        return BatchedLowRank(base, *pair)


def stack(base: Tree, adapters: Sequence[Tree], rank: int | None = None) -> Tree:
    """A pool: the base with the pairs of all ``adapters``, trees that LoRA made of this base, of any ranks and targets.

    Pairs are filled up to the largest rank, or to ``rank``, so that adapters yet to come fit (``replace``).

    Raises:
        ConfigError: an adapter changes more than low-rank pairs can, or has more than ``rank`` columns; a recurrent
            network, whose cells see a batch on another axis.
    """
    weights = flatten(base)
    if cells := [path for path in weights if _CELL.search(path)]:
        raise ConfigError("base", cells[0], "transformers and Mamba serve a batch of adapters, recurrent cells do not")
    flats = [_pairs(weights, adapter, index) for index, adapter in enumerate(adapters)]
    widest = max((pair.a.shape[-1] for flat in flats for pair in flat.values()), default=0)
    if rank is not None and widest > rank:
        raise ConfigError("rank", rank, f"an adapter has rank {widest}")
    pool = dict(weights)
    for path in sorted(set().union(*flats)):
        weight = weights[path]
        made = [_padded(flat.get(path), weight, rank or widest) for flat in flats]
        a, b = (jnp.stack(each, axis=len(weight.shape) - 2) for each in zip(*made, strict=True))
        pool[path] = BatchedLowRank(weight, a, b)
    return unflatten(pool)


def replace(pool: Tree, index: int, adapter: Tree) -> Tree:
    """The pool with another adapter at ``index``: the same shapes, so nothing is compiled again.

    Raises:
        ConfigError: as ``stack``; it has targets that no adapter of the pool has; there is no such place.
    """
    flat = flatten(pool)
    slots = {path: leaf for path, leaf in flat.items() if isinstance(leaf, BatchedLowRank)}
    pairs = _pairs(flat | {path: leaf.base for path, leaf in slots.items()}, adapter, index)
    if unknown := sorted(set(pairs) - set(slots)):
        raise ConfigError("targets", unknown[0], "no adapter of this pool has it", list(slots))
    places, rank = next(leaf.a.shape[-3:-1] for leaf in slots.values())
    if not 0 <= index < places:
        raise ConfigError("index", index, f"the pool has places 0 to {places - 1}")
    widest = max(pair.a.shape[-1] for pair in pairs.values())
    if widest > rank:
        raise ConfigError("rank", widest, f"the pool has room for {rank} (stack(..., rank=...))")
    for path, leaf in slots.items():
        a, b = _padded(pairs.get(path), leaf.base, rank)
        at = (..., index, slice(None), slice(None))
        slots[path] = BatchedLowRank(leaf.base, leaf.a.at[at].set(a), leaf.b.at[at].set(b))
    return unflatten(flat | slots)


def assign(pool: Tree, ids: Int[Array, "B"] | Int[np.ndarray, "B"] | Sequence[int]) -> Tree:
    """Parameters for a batch whose row b is served by adapter ``ids[b]`` of the pool, or by the base alone (-1).

    Raises:
        ConfigError: an id that the pool lacks (where ids are known: not inside jit).
    """
    places = next(x.a.shape[-3] for x in flatten(pool).values() if isinstance(x, BatchedLowRank))
    if not isinstance(ids, Tracer):
        known = np.asarray(ids)
        if known.ndim != 1 or not np.all((known >= -1) & (known < places)):
            raise ConfigError("ids", known.tolist(), f"one a row, from -1 (no adapter) to {places - 1}")
    # Out of bounds is filled with zeros; -1 would be the last.
    rows = jnp.where(jnp.asarray(ids) < 0, places, jnp.asarray(ids, jnp.int32))
    own = lambda x: jnp.take(x, rows, axis=-3, mode="fill", fill_value=0)  # noqa: E731

    def one(leaf: Any) -> Any:
        return BatchedLowRank(leaf.base, own(leaf.a), own(leaf.b)) if isinstance(leaf, BatchedLowRank) else leaf

    return jax.tree.map(one, pool, is_leaf=is_leaf)


def _pairs(weights: dict[str, Any], adapter: Tree, index: int) -> dict[str, LowRank]:
    """An adapter's pairs by path, after checking that all else is the base."""
    flat, field = flatten(adapter), f"adapters[{index}]"
    if set(flat) != set(weights):
        raise ConfigError(field, sorted(set(flat) ^ set(weights))[0], "weights of the base, nothing more or less")
    pairs = {path: leaf for path, leaf in flat.items() if isinstance(leaf, LowRank)}
    for path, weight in weights.items():
        own = flat[path].base if path in pairs else flat[path]
        if not _same(own, weight):
            raise ConfigError(field, path, "it must be the base's, with LoRA's pairs beside it alone")
    if not pairs:
        raise ConfigError(field, "no pair", "a tree that LoRA made")
    return pairs


def _same(one: Any, other: Any) -> bool:
    """Whether two weights, be they arrays or leaves, hold the same numbers."""
    if one is other:
        return True
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(x is y or np.array_equal(x, y) for x, y in pairs)


def _padded(pair: LowRank | None, weight: Any, rank: int) -> tuple[Array, Array]:
    """A pair as ``BatchedLowRank`` holds it, of ``rank`` rows; of zeros where there is none."""
    *layers, inputs, outputs = weight.shape
    if pair is None:
        sizes = ((*layers, rank, width) for width in (inputs, outputs))
        return jnp.zeros(next(sizes), weight.dtype), jnp.zeros(next(sizes), weight.dtype)
    more = [(0, 0)] * len(layers) + [(0, rank - pair.a.shape[-1]), (0, 0)]
    return jnp.pad(pair.a.mT, more), jnp.pad(pair.scale[..., None, None] * pair.b, more)
