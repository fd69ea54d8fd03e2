"""Attention by chunks of queries, with hand-written derivatives: ``attention.attend`` is its plain twin.

See ``fused.py`` for why, and for who chooses. Reverse mode only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32

from xylem.models.fused import fresh
from xylem.models.masks import Mask

F32 = jnp.float32


def scores_plain(query: Float[Array, "B K G T H"], key: Float[Array, "B S K H"]) -> Float32[Array, "B K G T S"]:
    """Every query by every key of its head, before it is scaled."""
    return jnp.einsum("bkgth,bskh->bkgts", query, key, preferred_element_type=F32)


def scores(query: Float[Array, "B K G T H"], key: Float[Array, "B S K H"], block: int) -> Float32[Array, "B K G T S"]:
    """``scores_plain`` by keys that lie in memory as (B, K, C, H, ``block``): a product a block (``in_blocks``)."""
    keys = rearrange(key, "b (c p) k h -> b k c h p", p=block)
    queries = rearrange(query, "b k g t h -> b k 1 (g t) h")
    # Written out for every block: XLA would exchange the sides of a product with one that is repeated.
    queries = fresh(jnp.broadcast_to(queries, (*keys.shape[:3], *queries.shape[3:])))
    products = jnp.einsum("bkcqh,bkchp->bkcqp", queries, keys, preferred_element_type=F32)
    return rearrange(products, "b k c (g t) p -> b k g t (c p)", t=query.shape[3])


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    scale: float,
    chunk: int,
    bias: Float[Array, "#B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """``attention.attend``, which is its plain twin, by chunks of queries, each against the keys it can see.

    As in FlashAttention (2205.14135, section 3.1, appendix B.4) one log-sum-exp a row is kept and the backward pass
    recomputes the weights: nothing of size T x S lives between the two. ``chunk`` grows where it would give more than
    ``MAX_BLOCKS`` blocks, each of which is compiled. Where there are few, the rows of the batch are cut too: the parts
    stay in the cache, and one's small operations run beside another's products.
    """
    batch, queries, heads = query.shape[:3]
    chunk = max(chunk, -(-queries // MAX_BLOCKS))
    blocks = tuple(_blocks(mask, queries, key.shape[1], chunk))
    mesh = jax.sharding.get_abstract_mesh()
    most = FEW_BLOCKS // len(blocks) if mesh.empty or mesh.size == 1 else 1  # rows that a mesh has split are left alone
    parts = next((count for count in range(min(most, MAX_PARTS), 1, -1) if batch % count == 0), 1)

    if bias is not None:
        bias = rearrange(bias, "B (K G) T S -> B K G T S", G=heads // key.shape[2])

    def part(index: int) -> Array:
        rows = slice(index * batch // parts, (index + 1) * batch // parts)
        own = jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, (query, key, value, mask))
        own_bias = bias if bias is None or bias.shape[0] == 1 else bias[rows]
        return _attention(scale, blocks, *own, own_bias)

    return jnp.concatenate([part(index) for index in range(parts)])


MAX_BLOCKS, FEW_BLOCKS, MAX_PARTS = 16, 8, 2


def _blocks(mask: Mask, queries: int, keys: int, chunk: int):
    """Pairs of (start, stop), of queries and of the keys they may see, by what is static in the mask."""
    in_order = mask.causal and mask.offset is None and mask.prefix is None
    for start in range(0, queries, chunk):
        stop, first, last = min(start + chunk, queries), 0, keys
        if in_order:
            last = min(stop, keys)
            if isinstance(mask.window, int):
                first = min(max(0, start - mask.window + 1), last - 1)
        yield (start, stop), (first, last)


def _scores(scale, rows, columns, q, kt, mask: Mask, bias):
    """Masked float32 scores of one block."""
    scores = jnp.einsum("BKGTH,BKHS->BKGTS", q, kt, preferred_element_type=F32) * scale
    if bias is not None:
        scores = scores + bias[..., rows, columns].astype(F32)
    if mask.causal or mask.window is not None or mask.query_segments is not None:
        scores = jnp.where(mask.block(rows, columns)[:, None, None], scores, -jnp.inf)
    return scores


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, blocks, query, key, value, mask, bias):
    return _attention_forward(scale, blocks, query, key, value, mask, bias)[0]


def _attention_forward(scale, blocks, query, key, value, mask, bias):
    groups = query.shape[2] // key.shape[2]
    outs, sums = [], []
    qs = rearrange(query, "B T (K G) H -> B K G T H", G=groups)
    kts = rearrange(key, "B S K H -> B K H S")
    vs = rearrange(value, "B S K H -> B K S H")
    for block in blocks:
        rows, columns = slice(*block[0]), slice(*block[1])
        q, kt, v = qs[..., rows, :], kts[..., columns], vs[..., columns, :]
        scores = _scores(scale, rows, columns, q, kt, mask, bias)
        peak = scores.max(-1, keepdims=True)
        peak = jnp.where(peak == -jnp.inf, 0.0, peak)  # a row that sees nothing: every weight below is exp(-inf) = 0
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        total = jnp.where(total == 0.0, 1.0, total)
        out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v) / total.astype(v.dtype)
        outs.append(rearrange(out, "B K G T H -> B T (K G) H"))
        sums.append(peak + jnp.log(total))
    out = jnp.concatenate(outs, axis=1)
    return out, (query, key, value, out, sums, mask, bias)


def _attention_backward(scale, blocks, saved, g):
    query, key, value, out, sums, mask, bias = saved
    groups = query.shape[2] // key.shape[2]
    split = partial(rearrange, pattern="B T (K G) H -> B K G T H", G=groups)
    # Row sums of weights * d(weights), from the output instead (2205.14135, appendix B.4, equation 4).
    inner = split((g.astype(F32) * out.astype(F32)).sum(-1, keepdims=True))
    dqs: list[Array] = []
    dbiases: list[Array] = []
    dkt: Any = 0.0
    dvt: Any = 0.0
    qs, gs, ks = split(query), split(g), rearrange(key, "B S K H -> B K S H")
    kts, vts = (rearrange(x, "B S K H -> B K H S") for x in (key, value))
    for block, log_sum in zip(blocks, sums, strict=True):
        rows, columns = slice(*block[0]), slice(*block[1])
        q, g_rows, k = qs[..., rows, :], gs[..., rows, :], ks[..., columns, :]
        kt, vt = kts[..., columns], vts[..., columns]
        weights = jnp.exp(_scores(scale, rows, columns, q, kt, mask, bias) - log_sum)
        dweights = jnp.einsum("BKGTH,BKHS->BKGTS", g_rows, vt, preferred_element_type=F32)
        slope = weights * (dweights - inner[..., rows, :])
        dscores = (slope * scale).astype(q.dtype)
        dqs.append(rearrange(jnp.einsum("BKGTS,BKSH->BKGTH", dscores, k), "B K G T H -> B T (K G) H"))
        around = [(0, 0)] * 3 + [(columns.start, key.shape[1] - columns.stop)]
        if bias is not None:
            dbiases.append(jnp.pad(_batch_sum(slope) if bias.shape[0] == 1 else slope, [(0, 0), *around]))
        weights = weights.astype(g.dtype)
        dvt += jnp.pad(jnp.einsum("BKGTH,BKGTS->BKHS", g_rows, weights, preferred_element_type=F32), around)
        dkt += jnp.pad(jnp.einsum("BKGTH,BKGTS->BKHS", q, dscores, preferred_element_type=F32), around)
    dk, dv = (rearrange(x, "B K H S -> B S K H").astype(key.dtype) for x in (dkt, dvt))
    dbias = None if bias is None else jnp.concatenate(dbiases, axis=3).astype(bias.dtype)
    return jnp.concatenate(dqs, axis=1), dk, dv, None, dbias


def _batch_sum(x: Float[Array, "B K G T S"]) -> Float[Array, "1 K G T S"]:
    """The sum over the batch as a product with ones, as in ``fused.add_bias``: left to itself XLA:CPU joins the sums of
    all layers that share a bias to one, and works it off in one thread."""
    rows = x.reshape(x.shape[0], -1)
    return (jnp.ones((1, rows.shape[0]), x.dtype) @ rows).reshape(1, *x.shape[1:])


_attention.defvjp(_attention_forward, _attention_backward)
