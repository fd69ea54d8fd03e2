"""Layers in a row: runs of equal ones, the scan over them, and the door through which their insides are read.

**Runs.** Layers of equal structure are stored stacked and scanned as one run, ``layers``; a tree may hold several runs
(``layers_0``, ``layers_1``, ...) when layers differ in structure. The scan reads which from the tree.

**Inside.** ``module.clone(taps=("block_out",))`` returns what passed those sites, stacked by layer, in ``Output.taps``;
``module.clone(intervene=fn)`` replaces it: ``fn(layer, site, x) -> x`` sees every site of every layer (traced, so
``layer`` is an array; the embedding's is -1). Absent, neither costs anything.

A *block* is a module called as ``block(h, context, cache, layer, site) -> (h, cache)``: ``context`` is what every layer
of one call shares, ``layer`` its number, ``site(name, x) -> x`` the door. What it is made of is the family's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Intervention = Callable[[Array, str, Array], Array]


class Sites:
    """The door of one layer: applies the intervention at each site, then keeps what is tapped."""

    def __init__(self, layer: Any, taps: tuple[str, ...] = (), intervene: Intervention | None = None):
        self.layer, self.taps, self.intervene, self.kept = layer, taps, intervene, {}

    def __call__(self, name: str, x: Array) -> Array:
        x = x if self.intervene is None else self.intervene(self.layer, name, x)
        if name in self.taps:
            self.kept[name] = x
        return x


def block_apply(
    block: nn.Module,
    layer_params: Any,
    h: Float[Array, "B T D"],
    context: Any,
    cache: Any,
    layer: Int[Array, ""] | int,
    taps: tuple[str, ...] = (),
    intervene: Intervention | None = None,
) -> tuple[Array, Any, dict[str, Array]]:
    """One layer as a pure function of its own parameters: what the scan, and a pipeline stage, repeat.

    Returns the new stream, the cache and what was tapped. Dropout depends on the layer's number alone, so it does not
    change with how the layers are cut into runs or recomputed.
    """
    site = Sites(layer, taps, intervene)
    rngs = {} if context.rng is None else {"dropout": jax.random.fold_in(context.rng, layer)}
    out: Any = block.apply({"params": layer_params}, h, context, cache, layer, site, rngs=rngs)
    return *out, site.kept


def runs(params: dict[str, Any]) -> list[str]:
    """Names of the runs of layers in a tree, in order: ``["layers"]`` or ``["layers_0", "layers_1", ...]``."""
    names = [name for name in params if re.fullmatch(r"layers(_\d+)?", name)]
    return sorted(names, key=lambda name: int(name.partition("_")[2] or 0))


def run_length(run: Any) -> int:
    """How many layers a run stacks."""
    return jax.tree.leaves(run)[0].shape[0]


def layer_runs(module: nn.Module, block: nn.Module, num_layers: int, h: Array, context: Any) -> list[Any]:
    """The runs the module's tree holds; when there is none yet, one run of freshly initialised layers.

    Raises:
        ValueError: the tree holds another number of layers.
    """
    held: Any = dict(module.variables.get("params", {}))
    names = runs(held)
    if not names:
        quiet = context.replace(train=False, rng=None)

        def init(key):
            keys = jax.random.split(key, num_layers)
            return jax.vmap(lambda k: block.init(k, h, quiet, None, 0, Sites(0))["params"])(keys)

        return [module.param("layers", init)]
    stacks = [held[name] for name in names]
    count = sum(run_length(stack) for stack in stacks)
    if count != num_layers:
        raise ValueError(f"{names}: the parameters hold {count} layers, the config asks for {num_layers}")
    return stacks


def _with(own: Any, once: Any) -> Any:
    """One layer's tree: what is its own, and where that is None what all layers share."""
    pick = lambda a, b: a if a is not None or b is None else b[0]  # noqa: E731
    return jax.tree.map(pick, own, once, is_leaf=lambda x: x is None)


def scan_layers(
    block: nn.Module,
    stacks: list[Any],
    h: Float[Array, "B T D"],
    context: Any,
    cache: Any,
    taps: tuple[str, ...],
    intervene: Intervention | None,
    remat: str,
    unroll: bool,
    shared: int | None = None,
) -> tuple[Array, Any, dict[str, Array]]:
    """Every layer of every run in order; the cache is carried, taps come back stacked by layer.

    ``shared``: one run of so many layers, where what is held only once (a layer axis of 1) serves them all.
    """

    def body(once, carry, inputs):
        (h, cache), (own, layer) = carry, inputs
        layer_params = own if once is None else _with(own, once)
        h, cache, kept = block_apply(block, layer_params, h, context, cache, layer, taps, intervene)
        return (h, cache), kept

    if remat != "none" and cache is None:  # what is read into a cache is not learned from
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        # Inside a scan nothing can be merged across iterations; unrolled, a barrier asks XLA to recompute all the same.
        unrolled = unroll or 1 in map(run_length, stacks)
        body = jax.checkpoint(body, policy=policy, prevent_cse=unrolled)
    carry: Any = (h, cache)
    start, kept = 0, []
    for stack in stacks:
        length, once = shared or run_length(stack), None
        if shared is not None:
            once = jax.tree.map(lambda x: x if x.shape[0] == 1 else None, stack)
            stack = jax.tree.map(lambda x: None if x.shape[0] == 1 else x, stack)
        if length == 1:  # nothing to scan, and its number is known: a cache may hold each layer apart
            carry, tapped = body(once, carry, (jax.tree.map(lambda x: x[0], stack), start))
            tapped = jax.tree.map(lambda x: x[None], tapped)
        else:
            inputs = (stack, start + jnp.arange(length))
            carry, tapped = jax.lax.scan(partial(body, once), carry, inputs, unroll=length if unroll else 1)
        start, kept = start + length, [*kept, tapped]
    return *carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
