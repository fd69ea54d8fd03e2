"""Weights and caches as a loop that writes token by token reads them fastest on XLA:CPU: the same network.

Each layer lies apart, since one is copied out of its stack every time it is applied; its matrices lie transposed, since
few rows are multiplied twice as fast by those (``fused.few_rows``), and its keys in blocks (``cache.in_blocks``).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from xylem.models import fused
from xylem.models.cache import KEY_BLOCK, KVCache, Seq2SeqCache
from xylem.models.leaves import Grafted, Transposed
from xylem.models.stack import run_length, runs

MANY_ROWS = 16


def ready(config: Any, params: Any) -> Any:
    """The tree with a run of its own for each layer, in encoders and decoders too, its kernels and the head transposed.

    Where the layers of ``config`` are unrolled and its kernels fused, which is where that was measured to pay; else the
    tree as it is, like one that is ready. It is a copy: whoever answers many times makes it once.
    """
    return _ready(params) if _pays(config) else params


def ready_cache(config: Any, cache: Any) -> Any:
    """The cache, or caches, with an array for each layer, under the same condition.

    In float32: XLA:CPU multiplies few rows by no other, and would convert keys and values anew for every token.
    """
    kinds = (KVCache, Seq2SeqCache)
    wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x  # noqa: E731
    apart = lambda x: jax.tree.map(wide, x.apart()) if isinstance(x, kinds) else x  # noqa: E731
    return jax.tree.map(apart, cache, is_leaf=lambda x: isinstance(x, kinds)) if _pays(config) else cache


def rooms_for(config: Any, cache: Any, tokens: int) -> list[int]:
    """The room for ``tokens`` more that a cache is given: at once, or in up to four parts, each when it is needed.

    Attention reads all the room that there is, which for many rows is a good part of what a step reads; each part is a
    loop that is compiled by itself, of whole blocks of keys but for the last. For 32 rows of 128 new tokens, 12 layers
    of 768, on two Zen 1 threads: 157 and 147 ms a step, 34 and 47 s for the first call.
    """
    if not isinstance(cache, (KVCache, Seq2SeqCache)) or not _pays(config) or len(cache.lengths) < MANY_ROWS:
        return [tokens]
    parts, first = max(1, min(4, tokens // KEY_BLOCK)), cache.capacity
    ends = [-(-(first + tokens * i // parts) // KEY_BLOCK) * KEY_BLOCK for i in range(1, parts)]
    return [end - start for start, end in pairwise([first, *ends, first + tokens])]


def _pays(config: Any) -> bool:
    compute = getattr(config, "compute", None)
    if compute is None:  # an n-gram model, which has no layers
        return False
    kernels = fused.choose(compute, jax.default_backend())
    return kernels.unroll and kernels.matmul


@jax.jit
def _ready(params: Any) -> Any:
    """A program of its own: inside another XLA would copy a layer anew for each of its readers."""
    return _apart(params)


def _apart(params: Any) -> Any:
    if not isinstance(params, dict):
        return params
    names = runs(params)
    rest = {name: _apart(part) for name, part in params.items() if name not in names}
    if "kernel" in rest.get("head", {}):
        rest["head"] = _transposed(rest["head"])
    stacks = [_transposed(params[name]) for name in names]
    single = [jax.tree.map(lambda x, i=i: x[i : i + 1], stack) for stack in stacks for i in range(run_length(stack))]
    return rest | {f"layers_{i}": one for i, one in enumerate(single)}


def _transposed(part: Any, name: str = "") -> Any:
    """A part of the tree with matrices as ``Transposed``; convolutions and recurrent cells read theirs otherwise."""
    if isinstance(part, dict):
        return {key: value if key in ("conv", "cell") else _transposed(value, key) for key, value in part.items()}
    if isinstance(part, Grafted):
        return part.replace(base=_transposed(part.base, name))  # type: ignore[attr-defined]
    if name == "kernel" and isinstance(part, jax.Array):
        return Transposed(part.mT)
    return part
