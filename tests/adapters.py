"""Adapters that look trained, on the small networks of ``grid.py``."""

from functools import partial

import jax
from grid import module_of, moved

from xylem import peft
from xylem.peft.tree import combine, partition


def learned(path, _) -> bool:
    return path.endswith(("/a", "/b"))


@partial(jax.jit, static_argnames=("rank", "targets"))
def _pairs(base, key, rank, targets):
    return partition(peft.lora(base, key, rank=rank, targets=targets), learned)[0]


def adapter_of(base, key, rank, targets=r"layers/.*/kernel"):
    """A LoRA of random pairs, its base the same arrays."""
    frozen = partition(peft.lora(base, key, rank=rank, targets=targets), learned)[1]
    return moved(combine(_pairs(base, key, rank, targets), frozen), learned, key)


@partial(jax.jit, static_argnames="family")
def logits_of(family, params, tokens):
    return module_of(family).apply({"params": params}, tokens).logits
