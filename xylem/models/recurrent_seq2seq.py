"""Encoder-decoders of recurrent cells: the encoder's last state is the decoder's first (1409.3215, section 2).

Pure functions of a tree. ``encoder`` and ``decoder`` hold ``embed/embedding`` and one layer each, ``cell`` (of weights
as in ``cells.py``); the decoder also ``head``, a kernel and a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xylem.models import cells
from xylem.models.layers import add_bias, einsum

Params = Mapping[str, Any]


def encode(
    cell: str, params: Params, tokens: Int[Array, "B S"], segments: Int[Array, "B S"] | None = None
) -> cells.State:
    """What the encoder remembers of each source; ``segments`` 0 is padding, which leaves no trace."""
    side = params["encoder"]
    state = cells.zero_state(cell, tokens.shape[0], side["cell"]["recurrent"]["kernel"].shape[0])
    states = _read(cell, side, tokens, state, segments)[1]
    return jax.tree.map(lambda each: each[-1], states)


def decode(
    cell: str, params: Params, tokens: Int[Array, "B T"], state: cells.State
) -> tuple[Float[Array, "B T V"], cells.State]:
    """Logits of the token behind each of a target's, from a state on, and the state after the last."""
    side = params["decoder"]
    hidden, states = _read(cell, side, tokens, state, None)
    logits = add_bias(einsum("...i,io->...o", hidden, side["head"]["kernel"]), side["head"]["bias"])
    return logits, jax.tree.map(lambda each: each[-1], states)


@partial(jax.jit, static_argnames=("cell", "start", "steps"))
def greedy(
    cell: str, params: Params, tokens: Int[Array, "B S"], segments: Int[Array, "B S"], start: int, steps: int
) -> Int[Array, "B U"]:
    """The likeliest token each time, ``steps`` times, behind the token ``start``; whoever asks knows where to stop."""

    def write(carry, _):
        token, state = carry
        logits, state = decode(cell, params, token[:, None], state)
        token = jnp.argmax(logits[:, 0], axis=-1).astype(token.dtype)
        return (token, state), token

    first = jnp.full(tokens.shape[0], start, tokens.dtype)
    return jax.lax.scan(write, (first, encode(cell, params, tokens, segments)), length=steps)[1].T


def _read(cell: str, side: Params, tokens: Array, state: cells.State, segments: Array | None) -> tuple[Array, Any]:
    embedded = jnp.take(side["embed"]["embedding"], tokens, axis=0)
    return cells.layer(cell, side["cell"], embedded, state, segments)
