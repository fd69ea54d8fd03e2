"""Virtual tokens: what stands in front of every text though nobody wrote it.

Two optional slots of a tree hold them. ``prompt/embedding`` (P, D) are rows that a network reads as if they were looked
up (prompt tuning 2104.08691); ``attention/prefix`` in every layer, ``{"key", "value"}`` (L, P, K H), are keys and
values that no token made (prefix-tuning 2101.00190). Positions of the text count on behind them. A cache holds them
from the start (``init_cache`` with ``params``); without one they are put in front in every call.

Every document of a packed row sees a prefix, and a decoder's prompt. The prompt of an encoder, whose tokens see the
text too, and of a Mamba, whose state ends with a document, belongs to the first document of its row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xylem.models.layers import split_heads
from xylem.models.stack import runs


def prompt_of(params: dict[str, Any]) -> Float[Array, "P D"] | None:
    """The rows of embeddings in front of every text; None where there are none."""
    return params["prompt"]["embedding"] if "prompt" in params else None


def virtual_length(params: dict[str, Any], prompt: Float[Array, "P D"] | None) -> int:
    """How many positions of a stack stand in front of a text's first: of its prefix and of a prompt that it reads."""
    return prefix_length(params) + (0 if prompt is None else prompt.shape[0])


def prefix_length(params: dict[str, Any], site: str = "attention") -> int:
    """How many keys stand in front of each layer's own, at ``attention`` or ``cross_attention``."""
    first = params[runs(params)[0]] if runs(params) else {}
    prefix = first.get(site, {}).get("prefix")
    return 0 if prefix is None else prefix["key"].shape[1]


class Text(NamedTuple):
    """What a network reads: embeddings, and what is known of each of them."""

    h: Float[Array, "B T E"]
    positions: Int[Array, "#B T"]
    segments: Int[Array, "B T"] | None
    token_types: Int[Array, "B T"] | None


def behind(params: dict[str, Any], text: Text) -> Text:
    """The text with its positions counted on behind the prefix of a stack's ``params``."""
    count = prefix_length(params)
    return text._replace(positions=text.positions + count) if count else text


def prepend(prompt: Float[Array, "P E"] | None, text: Text, of: int | None) -> Text:
    """The text behind a prompt, whose tokens are of segment ``of``, where there are segments: ``EVERYONE`` for all
    documents of a row to see them; None for that of the row's first token."""
    if prompt is None:
        return text
    (batch, _, width), count = text.h.shape, prompt.shape[0]
    rows = jnp.broadcast_to(prompt.astype(text.h.dtype)[None], (batch, count, width))
    before = jnp.broadcast_to(jnp.arange(count, dtype=text.positions.dtype), (text.positions.shape[0], count))
    positions = jnp.concatenate([before, text.positions + count], axis=1)
    types = None if text.token_types is None else jnp.pad(text.token_types, [(0, 0), (count, 0)])
    segments = lengthened(prompt, text.segments, of)
    return Text(jnp.concatenate([rows, text.h], axis=1), positions, segments, types)


def lengthened(
    prompt: Float[Array, "P E"] | None, segments: Int[Array, "B T"] | None, of: int | None
) -> Int[Array, "B S"] | None:
    """The segments of a text behind a prompt, as in ``prepend``."""
    if prompt is None or segments is None:
        return segments
    own = segments[:, :1] if of is None else jnp.full((segments.shape[0], 1), of, segments.dtype)
    return jnp.concatenate([jnp.broadcast_to(own, (segments.shape[0], prompt.shape[0])), segments], axis=1)


def join_prefix(
    prefix: dict[str, Any], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"]
) -> tuple[Float[Array, "B Q K H"], Float[Array, "B Q K H"]]:
    """Keys and values with a layer's prefix in front."""
    batch, _, _, head_dim = key.shape

    def front(name: str, own: Array) -> Array:
        rows = split_heads(prefix[name].astype(own.dtype)[None], head_dim)
        return jnp.concatenate([jnp.broadcast_to(rows, (batch, *rows.shape[1:])), own], axis=1)

    return front("key", key), front("value", value)


def stacked_prefix(
    params: dict[str, Any], head_dim: int, site: str = "attention"
) -> tuple[Float[Array, "L P K H"], Float[Array, "L P K H"]]:
    """Keys and values of the prefixes of all layers."""
    held = [params[name][site]["prefix"] for name in runs(params)]
    made = (jnp.concatenate([prefix[name] for prefix in held]) for name in ("key", "value"))
    key, value = (split_heads(each, head_dim) for each in made)
    return key, value
