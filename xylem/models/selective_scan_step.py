"""One step of the selective scan inside a kernel, and how a gradient is pulled back through it.

States are (Z, I); what belongs to channels, ``x``, ``delta`` and ``dy``, is (1, I), what belongs to states, ``B`` and
``C``, is (Z, 1); ``keep`` is a number or (1, 1).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def discretize(rule: str, delta: Array, A: Array) -> tuple[Any, ...]:
    """Decay, input weight, and the weight's derivatives by delta and by A, of one token: (Z, I), (1, I) or numbers."""
    decay = jnp.exp(delta * A)
    if rule == "euler":
        return decay, delta, 1.0, 0.0
    half = jnp.tanh(0.5 * delta * A)  # exp(v) - 1 = 2 tanh(v / 2) / (1 - tanh(v / 2)): Mosaic has no expm1
    weight = 2.0 * half / (1.0 - half) / A
    return decay, weight, decay, (delta * decay - weight) / A


def advance(rule: str, A: Array, h: Array, x: Array, delta: Array, B: Array, keep: Array) -> Array:
    """The states after one token."""
    decay, weight, _, _ = discretize(rule, delta, A)
    return keep * decay * h + weight * x * B


def pull(
    rule: str, A: Array, g: Array, before: Array, x: Array, delta: Array, B: Array, C: Array, keep: Array, dy: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """From ``g``, the gradient of the states after a token, and ``dy``, that of its output, those of the states
    ``before`` it (Z, I), of A (Z, I), of x and delta (1, I) and of B (Z, 1)."""
    decay, weight, by_delta, by_A = discretize(rule, delta, A)
    g = g + C * dy
    gB, dbefore = g * B, g * keep * decay
    q = dbefore * before
    dx = jnp.sum(gB * weight, axis=0, keepdims=True)
    ddelta = jnp.sum(q * A + gB * x * by_delta, axis=0, keepdims=True)
    dB = jnp.sum(g * (weight * x), axis=1, keepdims=True)
    return dbefore, q * delta + gB * x * by_A, dx, ddelta, dB
