"""Kernels that read the same input, joined side by side: fewer and wider products where weights are only read.

Training keeps them apart: an orthogonal update, a low rank or a prune score is of one matrix. Decoding one token at a
time is bound by reading weights, and there one product of 3 D columns reads better than three of D.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from xylem.models.leaves import is_leaf
from xylem.models.stack import runs

GROUPS = {"attention": ("query", "key", "value"), "mlp": ("up", "gate"), "mixer": ("input", "gate")}


def fuse(params: dict[str, Any]) -> dict[str, Any]:
    """The same network with the members of each group joined in every run where all are plain arrays.

    The kernels become ``attention/query_key_value/kernel`` (D, (N + 2 K) H), ``mlp/up_gate/kernel`` (D, 2 F) and
    ``mixer/input_gate/kernel`` (D, 2 I), biases likewise. Where one of a group is a leaf (``leaves.py``), or the group
    is not whole, it stays as it is.
    """

    def join(layer: dict[str, Any]) -> dict[str, Any]:
        return {name: _joined(part, GROUPS[name]) if name in GROUPS else part for name, part in layer.items()}

    return {**params, **{name: join(params[name]) for name in runs(params)}}


def _joined(part: dict[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
    members = [part.get(name) for name in group]
    if None in members or any(is_leaf(leaf) for leaf in jax.tree.leaves(members, is_leaf=is_leaf)):
        return part
    rest = {name: value for name, value in part.items() if name not in group}
    return {**rest, "_".join(group): jax.tree.map(lambda *each: jnp.concatenate(each, axis=-1), *members)}
