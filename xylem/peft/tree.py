"""The parameter tree as layers, and as what is learned and what is not.

Layers of equal structure are stacked on a leading axis under a *run*: ``layers``, or ``layers_0``, ``layers_1``, ...
Only this file knows where layer i is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.conversion import flatten, unflatten
from xylem.models.leaves import is_leaf
from xylem.models.stack import run_length, runs
from xylem.sharding import path_name

Tree = dict[str, Any]
Predicate = Callable[[str, Any], bool]  # of a path and the weight there
_RUN = re.compile(r"(?:.*/)?layers(?:_\d+)?(?=/)")


def layer(params: Tree, index: int) -> Tree:
    """The tree of one layer, without the layer axis."""
    name, within = _find(params, index)
    return jax.tree.map(lambda x: x[within], params[name])


def set_layer(params: Tree, index: int, new: Tree) -> Tree:
    """The same tree with layer ``index`` replaced by one of equal structure."""
    name, within = _find(params, index)
    if jax.tree.structure(params[name]) != jax.tree.structure(new):
        raise ValueError(f"layer {index}: the new layer's structure differs from its run's; split the run first")
    changed = jax.tree.map(lambda stack, one: jnp.asarray(stack).at[within].set(one), params[name], new)
    return {**params, name: changed}


def split(params: Tree, at: int) -> Tree:
    """Cut the run that holds layer ``at`` before it, so the layers from ``at`` on may take another structure.

    The network computes the same, to the bit. Runs are renamed ``layers_0``, ``layers_1``, ... in order.
    """
    name, within = _find(params, at)
    stacks = []
    for run in runs(params):
        if run == name and within > 0:
            stacks += [jax.tree.map(lambda x: x[:within], params[run]), jax.tree.map(lambda x: x[within:], params[run])]
        else:
            stacks.append(params[run])
    rest = {key: value for key, value in params.items() if key not in runs(params)}
    names = ["layers"] if len(stacks) == 1 else [f"layers_{i}" for i in range(len(stacks))]
    return {**rest, **dict(zip(names, stacks, strict=True))}


def unsplit(params: Tree) -> Tree:
    """Undo ``split`` in every stack: runs of equal structure become one, ``layers``; others stay apart."""
    whole = params | {name: unsplit(params[name]) for name in ("encoder", "decoder") if name in params}
    names = runs(params)
    stacks = [params[name] for name in names]
    outline = lambda stack: jax.tree.map(lambda x: (x.shape[1:], x.dtype), stack)  # noqa: E731
    if not names or any(outline(stack) != outline(stacks[0]) for stack in stacks):
        return whole
    rest = {name: part for name, part in whole.items() if name not in names}
    return {**rest, "layers": stacks[0] if len(names) == 1 else jax.tree.map(lambda *xs: jnp.concatenate(xs), *stacks)}


def parts(params: Tree) -> dict[str, Tree]:
    """The tree cut into its runs, each under its path, and all that has no layer axis under ``""``.

    Every part keeps full paths, so rules that go by path read the same in a part as in the whole.
    """
    cut: dict[str, dict] = {"": {}}
    for name, value in flatten(params).items():
        match = _RUN.match(name)
        cut.setdefault(match.group(0) if match else "", {})[name] = value
    return {name: unflatten(flat) for name, flat in cut.items()}


def join(cut: dict[str, Tree]) -> Tree:
    """Undo ``parts``."""
    flat = {}
    for part in cut.values():
        flat.update(flatten(part))
    return unflatten(flat)


def per_layer(function: Callable) -> Callable:
    """Lift a function of one layer's tree to parts: mapped over the layer axis of every run, called on the rest.

    So what is written for single matrices (orthogonalisation, factored moments, norms of one matrix) means the same
    for a stack of them. Takes and returns dictionaries keyed as ``parts`` keys them.
    """

    def lifted(*cuts: dict[str, Any]) -> dict[str, Any]:
        return {name: (jax.vmap(function) if name else function)(*(cut[name] for cut in cuts)) for name in cuts[0]}

    return lifted


def partition(params: Tree, predicate: Predicate) -> tuple[Tree, Tree]:
    """``(chosen, rest)``: two trees of the same structure, None where the other one holds the weight.

    ``predicate(path, weight)`` chooses, a path reading ``layers/attention/query/kernel``. A leaf that is no array is
    cut inside: its arrays are chosen one by one, named by their field.
    """
    chosen = jax.tree_util.tree_map_with_path(lambda path, x: x if predicate(path_name(path), x) else None, params)
    rest = jax.tree_util.tree_map_with_path(lambda path, x: None if predicate(path_name(path), x) else x, params)
    return chosen, rest


def combine(*trees: Tree) -> Tree:
    """The tree that ``partition`` cut: at each place the one value that is not None."""
    pick = lambda *xs: next((x for x in xs if x is not None), None)  # noqa: E731
    return jax.tree.map(pick, *trees, is_leaf=lambda x: x is None)


def matrices(params: Tree, targets: str) -> dict[str, Any]:
    """The matrices whose paths ``targets`` finds: path -> weight.

    Matrices are kernels and embedding tables, stacked ones whole, be they arrays or leaves; a convolution's kernel is
    none: it has a few numbers for each channel and mixes none. ``targets`` is a regular expression, searched for in
    paths like ``layers/attention/query/kernel``.

    Raises:
        ConfigError: it is no regular expression, or finds no matrix.
    """
    flat = flatten(params)
    named = [path for path in flat if path.endswith(("/kernel", "/embedding")) and not path.endswith("conv/kernel")]
    found = {path: flat[path] for path in named if matches(targets, path)}
    if not found:
        raise ConfigError("targets", targets, f"it must find some of {', '.join(named)}")
    return found


def rewrite(params: Tree, targets: str, rule: Callable[[str, Any, PRNGKeyArray], Any], key: PRNGKeyArray) -> Tree:
    """The tree with ``rule(path, weight, key)`` in place of each of ``matrices``; each has a key of its own.

    Raises:
        ConfigError: as ``matrices``.
    """
    found = matrices(params, targets)
    keys = jax.random.split(key, len(found))
    made = {path: rule(path, weight, each) for (path, weight), each in zip(found.items(), keys, strict=True)}
    return unflatten(flatten(params) | made)


def check_absent(params: Tree, method: str, *nodes: str) -> None:
    """Raise ConfigError where the tree holds one of the nodes that a method adds: nothing learned is written over."""
    held = next((path for path in flatten(params) if any(node in path.split("/") for node in nodes)), None)
    if held is not None:
        allowed = f"the base holds one already, {held}: begin with the base that it was grafted on"
        raise ConfigError("method", method, allowed)


def beside(path: str, targets: str, fields: tuple[str, ...]) -> bool:
    """Whether a path is that of one of the ``fields`` of a graft on one of the matrices that ``targets`` finds.

    Of the outermost one: what earlier grafts left lies below its ``base``.
    """
    weight, _, field = path.rpartition("/")
    return field in fields and weight.endswith(("kernel", "embedding")) and matches(targets, weight)


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression finds something in a path.

    Raises:
        ConfigError: it is none.
    """
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise ConfigError("targets", pattern, f"a regular expression is wanted ({error})") from error


def count(params: Tree) -> int:
    """Number of scalars the network's weights stand for; a leaf that is no array counts as its weight."""
    return sum(math.prod(weight.shape) for weight in jax.tree.leaves(params, is_leaf=is_leaf))


def _find(params: Tree, index: int) -> tuple[str, int]:
    start = 0
    for name in runs(params):
        length = run_length(params[name])
        if start <= index < start + length:
            return name, index - start
        start += length
    raise ValueError(f"layer {index}: the tree holds layers 0 to {start - 1}")
