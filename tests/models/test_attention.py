"""Attention, its masks and its caches: what each is held against, and that nothing leaks between documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from operations import apart
from small import B, T, apply, logits

from xylem import models
from xylem.models.attention import attend
from xylem.models.cache import KVCache
from xylem.models.masks import Mask
from xylem.models.settings import Compute

BAR = 1e-5


def test_cached_decoding_equals_the_full_forward(case, proof, rng_seed):
    config, module, params, tokens = case
    full = logits(module, params, tokens)
    step = lambda cache, ids: apply(module, params, ids, cache=cache)  # noqa: E731
    out = prefilled = step(KVCache.init(config, B, T), tokens[:, :6])
    parts = [out.logits]
    for t in range(6, T):
        out = step(out.cache, tokens[:, t : t + 1])
        parts.append(out.logits)
    assert out.cache.lengths.tolist() == [T] * B
    shorter = prefilled.cache.rewind(prefilled.cache.lengths - 1)
    assert apart(step(shorter, tokens[:, 6:7]).logits[:, 0], full[:, 6]) > BAR
    error = apart(jnp.concatenate(parts, axis=1), full)
    row = f"cache: token by token ({config.family})"
    proof(row, "the full forward pass", error, BAR, rng_seed, "lengths one too short")


def test_cache_rewinds_rows_to_unequal_lengths(case):
    config, module, params, tokens = case
    lengths = jnp.array([4, 7, 6])
    step = lambda cache, ids: apply(module, params, ids, cache=cache)  # noqa: E731
    cache = step(KVCache.init(config, B, T + 4), tokens[:, :9]).cache.rewind(lengths)
    out = step(cache, tokens[:, 9:11])
    for row, length in enumerate(lengths.tolist()):
        alone = jnp.concatenate([tokens[row, :length], tokens[row, 9:11]])[None]
        assert apart(out.logits[row], logits(module, params, alone)[0, -2:]) <= BAR


def test_cache_forgets_padding(case, proof, rng_seed):
    config, module, params, tokens = case
    lengths = jnp.array([9, 4, 6])
    real = (jnp.arange(9)[None] < lengths[:, None]).astype(jnp.int32)
    cache = apply(module, params, tokens[:, :9], segments=real, cache=module.init_cache(B, T)).cache
    assert cache.lengths.tolist() == lengths.tolist()
    remembering = apply(module, params, tokens[:, :9], cache=module.init_cache(B, T)).cache

    def error(cache):
        out = apply(module, params, tokens[:, 9:11], cache=cache).logits
        alone = [jnp.concatenate([tokens[row, : lengths[row]], tokens[row, 9:11]])[None] for row in range(B)]
        return max(apart(out[row], logits(module, params, ids)[0, -2:]) for row, ids in enumerate(alone))

    assert error(remembering) > BAR
    row = f"cache: prompts of unequal length ({config.family})"
    proof(row, "each row alone", error(cache), BAR, rng_seed, "padding remembered")


def test_cache_select_follows_its_rows(case):
    config, module, params, tokens = case
    rows = jnp.array([2, 0, 0, 1])
    out = apply(module, params, tokens[:, :5], cache=KVCache.init(config, B, T))
    chosen = apply(module, params, tokens[rows, 5:8], cache=out.cache.select(rows))
    assert apart(chosen.logits, logits(module, params, tokens)[rows, 5:8]) <= BAR


def test_cache_is_carried_not_copied_through_the_layers(case):
    config, _, params, _ = case
    scanned = models.build(dataclasses.replace(config, compute=Compute(layers="scan", kernels="plain")))
    cache = KVCache.init(config, B, 4096)
    step = jax.jit(lambda c, t: scanned.apply({"params": params}, t, cache=c).cache, donate_argnums=0)
    memory = step.lower(cache, jnp.zeros((B, 1), jnp.int32)).compile().memory_analysis()
    whole = 2 * cache.key.nbytes
    assert memory.alias_size_in_bytes >= whole, "the new cache must live in the old one's memory"
    assert memory.temp_size_in_bytes < whole, "no second cache while stepping"


def test_packed_documents_read_as_if_alone(case, proof, rng_seed):
    config, module, params, tokens = case
    segments = jnp.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13, [1] * 2 + [2] * 2 + [3] * 9])
    packed, leaking = logits(module, params, tokens, segments=segments), logits(module, params, tokens)
    errors, faulty = [], []
    for row in range(B):
        for segment in range(1, 4):
            where = np.flatnonzero(np.asarray(segments[row]) == segment)
            if len(where):
                alone = logits(module, params, tokens[row, where][None])[0]
                errors.append(apart(packed[row, where], alone))
                faulty.append(apart(leaking[row, where], alone))
    assert bool(jnp.isfinite(packed).all())
    assert len(errors) == 6 and max(faulty) > BAR
    row = f"packed documents ({config.family})"
    proof(row, "each document alone", max(errors), BAR, rng_seed, "segments left out")


def test_editing_a_token_leaves_earlier_outputs_alone(case):
    config, module, params, tokens = case
    edited = tokens.at[:, 8].set((tokens[:, 8] + 1) % config.vocab_size)
    before, after = logits(module, params, tokens), logits(module, params, edited)
    assert bool((before[:, :8] == after[:, :8]).all())
    assert not np.allclose(before[:, 8:], after[:, 8:])


def test_attend_equals_a_numpy_loop(rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    heads, kv_heads, width = 6, 3, 5
    q, k, v = (rng.normal(size=(2, n, h, width)) for n, h in ((7, heads), (9, kv_heads), (9, kv_heads)))
    segments = rng.integers(0, 3, (2, 9))
    segments[0] = 1  # a row of one document, where a window one wider always shows
    spec = Mask(window=4, query_segments=jnp.array(segments[:, 2:]), key_segments=jnp.array(segments),
                offset=jnp.array([2, 2]))  # fmt: skip
    inputs = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    expected = np.zeros(q.shape)
    for b in range(2):
        for t in range(7):
            for n in range(heads):
                slot = t + 2
                seen = [s for s in range(9) if s <= slot and s > slot - 4 and segments[b, s] == segments[b, slot]]
                scores = np.array([q[b, t, n] @ k[b, s, n // 2] / np.sqrt(width) for s in seen])
                weights = np.exp(scores - scores.max())
                weighted = [w * v[b, s, n // 2] for w, s in zip(weights / weights.sum(), seen, strict=True)]
                expected[b, t, n] = sum(weighted)
    assert apart(attend(*inputs, spec.replace(window=5)), expected) > BAR
    error = apart(attend(*inputs, spec), expected)
    proof("attend(): groups, window, segments, offset", "a NumPy loop", error, BAR, rng_seed, "window one wider")


def test_mask_blocks_tile_the_array_and_hold_no_square(rng_seed):
    rng = np.random.default_rng(rng_seed)
    segments = jnp.array(rng.integers(0, 3, (2, 12)))
    spec = Mask(window=jnp.int32(5), prefix=jnp.array([2, 4]), query_segments=segments, key_segments=segments)
    assert all(leaf.size <= 24 for leaf in jax.tree.leaves(spec))
    whole = spec.array(12, 12)
    for rows in (slice(0, 5), slice(5, 12)):
        for columns in (slice(0, 7), slice(7, 12)):
            assert bool((spec.block(rows, columns) == whole[:, rows, columns]).all())


def test_a_row_that_sees_nothing_gives_zeros_and_finite_gradients():
    q = jnp.ones((1, 3, 2, 4))
    spec = Mask(query_segments=jnp.array([[1, 1, 2]]), key_segments=jnp.array([[1, 3, 3]]))
    out = attend(q, q, q, spec)
    assert bool((out[0, 2] == 0).all())
    assert bool(jnp.isfinite(jax.grad(lambda x: attend(x, x, x, spec).sum())(q)).all())
