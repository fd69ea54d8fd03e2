"""Attention masks as specifications: who may attend to whom, without a T x T array.

A key is visible to a query when every part of the spec that is present allows it:

- ``causal``: the key's slot is not after the query's slot;
- ``window``: the key lies fewer than ``window`` slots before the query (Mistral 2310.06825, section 2.1);
- ``prefix``: slots below ``prefix`` are visible to all, before and after (T5 1910.10683, section 3.2.1);
- ``segments``: query and key carry the same segment id, so packed documents do not see each other; a key of segment
  ``EVERYONE`` is seen by all.

A *slot* is a place in the key sequence. A query's slot differs from its row index when a cache holds earlier keys:
``offset`` says how many keys stood before this row's first query.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

EVERYONE = 2**30  # far from any document's number, and from what a caller may mark padding with


class Mask(struct.PyTreeNode):
    """What a query may attend to; ``None`` in a field means that this part restricts nothing."""

    causal: bool = struct.field(pytree_node=False, default=True)
    window: Int[Array, ""] | int | Any = None
    prefix: Int[Array, "B"] | Any = None
    query_segments: Int[Array, "B T"] | Any = None
    key_segments: Int[Array, "B S"] | Any = None
    offset: Int[Array, "B"] | Any = None

    def block(self, query: slice, key: slice) -> Bool[Array, "#B t s"]:
        """The mask of queries ``query`` against keys ``key``; True where attention is allowed.

        Both slices need explicit bounds. This is all that chunked, ring and paged attention ask for.
        """
        rows = jnp.arange(query.start, query.stop)[None, :, None]
        if self.offset is not None:
            rows = rows + self.offset[:, None, None]
        columns = jnp.arange(key.start, key.stop)[None, None, :]
        allowed = columns <= rows if self.causal else jnp.ones((1, rows.shape[1], columns.shape[2]), bool)
        if self.window is not None:
            allowed = allowed & (columns > rows - self.window)
        if self.prefix is not None:
            allowed = allowed | (columns < self.prefix[:, None, None])
        if self.query_segments is not None and self.key_segments is not None:
            seen = self.key_segments[:, None, key]
            allowed = allowed & ((self.query_segments[:, query, None] == seen) | (seen == EVERYONE))
        return allowed

    def behind(self, count: int, batch: int) -> Mask:
        """The mask of the same queries when ``count`` keys that all may see stand in front of their own."""
        offset = jnp.full(batch, count) if self.offset is None else self.offset + count
        prefix = None if self.prefix is None else self.prefix + count
        keys = self.key_segments
        keys = None if keys is None else jnp.pad(keys, [(0, 0), (count, 0)], constant_values=EVERYONE)
        return self.replace(offset=offset, prefix=prefix, key_segments=keys)

    def array(self, queries: int, keys: int) -> Bool[Array, "#B T S"]:
        """The whole mask, for the readable reference and for small sizes."""
        return self.block(slice(0, queries), slice(0, keys))
