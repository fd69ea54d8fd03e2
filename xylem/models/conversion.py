"""Other people's tensors <-> our parameter trees, by table.

A family's table has one ``Row`` a tensor: its name outside, the leaves of ours it holds, and how it is laid out.
Reading and writing walk the same rows, so a name or a layout is stated once. Where a tensor lies (safetensors, GGUF) is
the business of a ``Source``, which hands it out in blocks: reading never holds more than one block beside the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xylem.errors import ConfigError
from xylem.models.leaves import materialize

BLOCK_BYTES = 1 << 23
SHOWN = 8

Place = Callable[[str, np.ndarray], Any]


@runtime_checkable
class Source(Protocol):
    """One tensor of a checkpoint: its shape, and its content a few rows of the first axis at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Consecutive rows, about ``size`` bytes at once; a vector comes whole."""
        ...


@dataclass(frozen=True)
class Held:
    """A small tensor that is in memory already, as a ``Source``."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All of it at once."""
        yield self.value


@dataclass(frozen=True)
class Row:
    """One line of a table: a tensor of theirs and where it goes in our tree.

    Attributes:
        theirs: its name; ``{layer}`` stands for the layer's number, and such a tensor is a slice of a stacked leaf.
        ours: paths of the leaves it holds. Several lie side by side on its last axis (GPT-2's ``c_attn``), or behind
            each other on its first where it is ``transposed``.
        transposed: it is (out, in) as in ``torch.nn.Linear``, where our kernels are (in, out).
        depthwise: it has an axis of 1 in the middle, as the kernel of a ``torch.nn.Conv1d`` with a group a channel.
        interleaved: rows of each head come in the order of Meta's rotary pairs, (2i, 2i + 1) rotating together, where
            ours rotates (i, i + H/2). Read only.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    depthwise: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is one such tensor a layer."""
        return "{layer}" in self.theirs

    def names(self, num_layers: int) -> list[str]:
        """The tensors this row stands for."""
        return [self.theirs.format(layer=i) for i in range(num_layers)] if self.stacked else [self.theirs]

    def shape(self, template: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[int, ...]:
        """Shape of one such tensor, from the leaves it holds."""
        shapes = [template[path].shape[1 if self.stacked else 0 :] for path in self.ours]
        joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        joined = joined[::-1] if self.transposed else joined
        return (joined[0], 1, *joined[1:]) if self.depthwise else joined


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, ``layers/mlp/up/kernel``; what stands for a weight (``leaves.Leaf``) is one leaf."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Nested dicts from leaves by path."""
    return unflatten_dict(dict(flat), sep="/")


def listed(names: Any) -> str:
    """The first few names and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def rows_for(rows: tuple[Row, ...], template: Mapping[str, jax.ShapeDtypeStruct]) -> list[Row]:
    """The rows a configuration uses: a table also names what only some have (an untied head, learned positions)."""
    return [row for row in rows if all(path in template for path in row.ours)]


def half_split(columns: int, head_dim: int) -> np.ndarray:
    """Where each interleaved column goes: within a head, 2i + p becomes p * H/2 + i."""
    pairs = np.arange(columns).reshape(-1, 2, head_dim // 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def read(
    origin: str,
    rows: tuple[Row, ...],
    sources: Mapping[str, Source],
    template: Mapping[str, jax.ShapeDtypeStruct],
    head_dim: int,
    place: Place,
) -> dict:
    """The tree of ``template``'s paths, shapes and types, filled from ``sources``.

    All names and shapes are compared before the first byte is read. Each leaf is allocated once, filled layer by layer,
    and handed to ``place``, which returns what the tree shall hold.

    Args:
        origin: what the error messages call the checkpoint.
        head_dim: width of a head, for interleaved rows.

    Raises:
        ConfigError: tensors missing, left over or of another shape than the configuration gives.
    """
    used = rows_for(rows, template)
    _check(origin, used, sources, template)
    flat = {}
    for row in used:
        leaves = [_allocate(template[path].shape, template[path].dtype) for path in row.ours]
        names = row.names(leaves[0].shape[0])
        for index, name in enumerate(names):
            _fill([leaf[index] for leaf in leaves] if row.stacked else leaves, row, sources[name], head_dim)
        flat.update({path: place(path, leaf) for path, leaf in zip(row.ours, leaves, strict=True)})
        del leaves  # on an accelerator the host copy ends here
    return unflatten(flat)


def write(row: Row, layer: int, params: Mapping[str, Any]) -> np.ndarray:
    """One tensor of theirs from our flat tree, contiguous: the inverse of reading its row."""
    pieces = []
    for path in row.ours:
        leaf = materialize(params[path])
        pieces.append(np.asarray(leaf[layer] if row.stacked else leaf))
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
    joined = joined.T if row.transposed else joined
    return np.ascontiguousarray(joined[:, None] if row.depthwise else joined)


def _check(
    origin: str, rows: list[Row], sources: Mapping[str, Source], template: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    wanted = {}
    for row in rows:
        layers = template[row.ours[0]].shape[0]
        if row.stacked and layers > len(sources):
            raise ConfigError("num_layers", layers, f"{origin} holds {len(sources)} tensors in all")
        wanted.update({name: (row, row.shape(template)) for name in row.names(layers)})
    uncovered = template.keys() - {path for row in rows for path in row.ours}
    if uncovered:
        raise ConfigError("checkpoint", origin, f"this format has no place for {listed(uncovered)}")
    missing, extra = wanted.keys() - sources.keys(), sources.keys() - wanted.keys()
    problems = [f"it lacks {listed(missing)}"] if missing else []
    problems += [f"its config has no place for {listed(extra)}"] if extra else []
    if problems:
        raise ConfigError("checkpoint", origin, "; ".join(problems))
    for name, (row, shape) in wanted.items():
        if tuple(sources[name].shape) != shape:
            raise ConfigError(
                " + ".join(row.ours),
                tuple(sources[name].shape),
                f"{name} in {origin} has this shape, its config asks for {shape}",
            )


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that starts on a 64-byte line: jax on a CPU then adopts it instead of copying."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(views: list[np.ndarray], row: Row, source: Source, head_dim: int) -> None:
    """Write one tensor into its leaves (or its layer's slices of them), block by block."""
    start = 0
    columns = half_split(source.shape[0], head_dim) if row.interleaved else None
    edges = np.cumsum([view.shape[-1] for view in views])
    for block in source.blocks(BLOCK_BYTES):
        stop = start + len(block)
        block = block[:, 0] if row.depthwise else block
        if columns is not None:
            views[0][:, columns[start:stop]] = block.T
        elif row.transposed:
            pieces = np.split(block, np.clip(edges[:-1] - start, 0, len(block)))
            for view, edge, piece in zip(views, edges, pieces, strict=True):
                first = max(start - (edge - view.shape[-1]), 0)
                view[:, first : first + len(piece)] = piece.T
        else:
            for view, piece in zip(views, np.split(block, edges[:-1], axis=-1), strict=True):
                view[start : start + len(piece)] = piece
        start = stop
