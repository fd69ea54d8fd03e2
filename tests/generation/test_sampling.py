"""Sampling: which tokens can be drawn, how often, and that a batch gives what each prompt alone gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xylem import models
from xylem.errors import ConfigError
from xylem.generation import sampling
from xylem.generation.sampling import BUCKET, Sampling, _loop, draw, filter_logits, generate, likeliest
from xylem.models.decoding import MANY_ROWS
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.models.settings import Compute
from xylem.models.t5 import t5

VOCAB = 37


@pytest.fixture(scope="module", params=["gpt", "llama"])
def model(request):
    if request.param == "gpt":
        config = gpt(2, 20, 5, vocab_size=VOCAB, max_length=48)
    else:
        config = llama(2, 24, 6, 3, 29, VOCAB, 48, rope_theta=99.0, norm_eps=1e-5)
    module = models.build(dataclasses.replace(config, compute=Compute(layers="scan", kernels="plain")))
    params = jax.jit(lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(jax.random.key(3))
    return module, jax.tree.map(lambda x: x * 6.0, params)  # far from uniform


def prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def clear_of_sums(logits: np.ndarray, k: int, p: float) -> bool:
    """Whether no sum of the smallest of the k largest probabilities is near 1 - p."""
    kept = np.sort(logits.astype(np.float64))
    kept = kept[kept >= kept[-k]]
    weights = np.exp(kept - kept[-1])
    return bool(np.abs(np.cumsum(weights) / weights.sum() - (1.0 - p)).min() > 1e-5)


def test_an_answer_past_the_room_its_prompt_was_read_in_is_that_without_a_cache(model, rng_seed):
    module, params = model
    texts, written = prompts(rng_seed, [20, 26]), 20
    assert max(map(len, texts)) + written > BUCKET  # so the cache grows, and what is written comes to lie there
    out = generate(module, params, texts, Sampling(written, temperature=0.0), jax.random.key(0))
    for text, tokens in zip(texts, out.tokens, strict=True):
        ids = jnp.array([[*text, *tokens.tolist()]])
        logits = module.apply({"params": params}, ids).logits[0, len(text) - 1 : -1]
        chosen = logits[jnp.arange(written), tokens]
        assert len(tokens) == written and bool((chosen >= logits.max(-1) - 1e-3).all())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_answers_of_many_rows_in_a_cache_that_grows_on_the_way_are_those_without_one(family, rng_seed, monkeypatch):
    if family == "t5":
        config = t5(2, 20, 3, 7, 29, "1.1", VOCAB, 134)
    else:
        config = llama(2, 24, 6, 3, 29, VOCAB, 134, rope_theta=99.0, norm_eps=1e-5)
    module = models.build(config.with_compute(Compute(layers="unroll", kernels="fused")))
    params = jax.jit(lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(jax.random.key(rng_seed))
    params = jax.tree.map(lambda x: x * 3.0, params)
    texts, written = prompts(rng_seed, [3, *[7] * (MANY_ROWS - 1), 64]), 70  # 64 needs no padding
    rooms, grow, key = [], sampling.grown, jax.random.key(rng_seed + 1)
    monkeypatch.setattr(sampling, "grown", lambda cache, room: rooms.append(room) or grow(cache, room))
    noise = lambda key: jax.random.gumbel(key, (len(texts), VOCAB))  # noqa: E731
    # Drawn by noise that is known, for likely tokens repeat themselves.
    monkeypatch.setattr(sampling, "draw", lambda logits, _, key: jnp.argmax(logits + noise(key), axis=-1))
    found = generate(module, params, texts, Sampling(written), key)
    assert rooms == ([63, 32] if family == "t5" else [64, 6])  # whole blocks of keys, but for the last
    whole = jax.jit(lambda *ids: module.apply({"params": params}, *ids).logits)
    noises = jax.jit(jax.vmap(lambda step: noise(jax.random.fold_in(key, step))))(jnp.arange(written))
    for row, (text, tokens) in enumerate(zip(texts, found.tokens, strict=True)):
        assert len(tokens) == written
        if family == "t5":
            logits = whole(jnp.array([text]), jnp.array([[module.config.decoder_start, *tokens[:-1].tolist()]]))[0]
        else:
            logits = whole(jnp.array([[*text, *tokens[:-1].tolist()]]))[0, len(text) - 1 :]
        scores = np.asarray(logits + noises[:, row])
        assert (scores[np.arange(written), tokens] >= scores.max(-1) - 1e-4 * np.abs(scores).max()).all()


@pytest.mark.oracle
def test_support_equals_the_reference_warpers_exactly(rng_seed, proof):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(rng_seed)
    wrong = caught = 0
    for _ in range(20):
        # Rounded, so that many of the fifty rows hold ties. Quarters keep float32 softmax sums alike on both sides.
        logits = np.round(rng.normal(size=(50, VOCAB)) * 8).astype(np.float32) / 4
        temperature, k, p = float(rng.uniform(0.3, 2)), int(rng.integers(1, VOCAB)), float(rng.uniform(0.05, 0.99))
        # Where p falls on a sum of probabilities, rounding decides: such rows are left out.
        logits = logits[[clear_of_sums(row / temperature, k, p) for row in logits]]
        expected = torch.tensor(logits)
        for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
            expected = warper(None, expected)
        theirs = np.sort(expected.numpy(), axis=-1)
        # Sorted: torch.sort is not stable, so which of several equal logits top-p cuts is arbitrary there; how many
        # are cut, and at which value, is not.
        scores = jnp.asarray(logits)
        ours = np.sort(np.asarray(filter_logits(scores, Sampling(1, temperature, k, p))), axis=-1)
        wrong += int((np.isfinite(ours) != np.isfinite(theirs)).sum())
        both = np.isfinite(ours) & np.isfinite(theirs)
        np.testing.assert_allclose(ours[both], theirs[both], rtol=1e-6)
        nucleus_first = filter_logits(filter_logits(scores, Sampling(1, temperature, None, p)), Sampling(1, 1.0, k))
        caught += int((np.isfinite(np.sort(np.asarray(nucleus_first), axis=-1)) != np.isfinite(theirs)).sum())
    assert caught > 0, "top-p before top-k must show"
    proof("sampling: support", "transformers' logits warpers, 1,000 rows with ties", wrong, 0, rng_seed, "top-p first")


def test_draws_follow_the_distribution(rng_seed):
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.06, 0.04]]))
    keys = jax.random.split(jax.random.key(rng_seed), 20_000)
    sampling = Sampling(1, temperature=1.0, top_p=0.85)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: draw(logits, sampling, key)[0]))(keys))
    counts, expected = np.bincount(drawn, minlength=5), np.array([0.5, 0.2, 0.2, 0, 0]) / 0.9 * len(keys)
    assert counts[3:].sum() == 0
    statistic = ((counts - expected)[:3] ** 2 / expected[:3]).sum()
    assert statistic < 32.0, "chi-square with 2 degrees of freedom: p = 1e-7"


def test_no_filter_is_the_plain_distribution():
    logits = jax.random.normal(jax.random.key(0), (3, VOCAB))
    assert bool((filter_logits(logits, Sampling(1, 1.0, VOCAB, 1.0)) == logits).all())


def test_the_likeliest_token_is_the_first_of_the_greatest_logits(rng_seed):
    logits = np.random.default_rng(rng_seed).integers(-3, 3, (7, 41)).astype(np.float32)  # many are equal
    logits[1] = -np.inf
    logits[2, 17:] = np.inf
    assert (np.asarray(likeliest(jnp.asarray(logits))) == logits.argmax(-1)).all()
    assert likeliest(jnp.full((1, 5), jnp.nan)) == 4  # a token all the same


def test_greedy_equals_stepwise_argmax_for_unequal_prompts(model, rng_seed):
    module, params = model
    texts = prompts(rng_seed, (3, 11, 7))
    completions = generate(module, params, texts, Sampling(9, temperature=0.0), jax.random.key(0))
    apply = jax.jit(lambda ids: module.apply({"params": params}, ids).logits)
    for text, tokens in zip(texts, completions.tokens, strict=True):
        ids = list(text)
        for token in tokens:
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            row = np.asarray(apply(padded))[0, len(ids) - 1]
            assert row[token] >= row.max() - 1e-4 * np.abs(row).max()
            ids.append(int(token))
    assert [len(tokens) for tokens in completions.tokens] == [9, 9, 9] and not any(completions.stopped)


def test_a_batch_gives_what_each_prompt_alone_gives(model, rng_seed):
    module, params = model
    texts = prompts(rng_seed, (2, 9, 5))
    sampling, key = Sampling(8, temperature=0.0), jax.random.key(1)
    together = generate(module, params, texts, sampling, key).tokens
    apply = jax.jit(lambda ids: module.apply({"params": params}, ids).logits)
    for text, tokens in zip(texts, together, strict=True):
        alone = generate(module, params, [text], sampling, key).tokens[0]
        for place in np.flatnonzero(tokens != alone)[:1]:  # two tokens as likely, but for rounding, may change places
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(text) + place] = [*text, *alone[:place]]
            row = np.asarray(apply(padded))[0, len(text) + place - 1]
            assert abs(row[tokens[place]] - row[alone[place]]) <= 1e-4 * np.abs(row).max()


def test_stop_tokens_end_their_row_only(model, rng_seed):
    module, params = model
    texts = prompts(rng_seed, (4, 6))
    free = generate(module, params, texts, Sampling(10, temperature=0.0), jax.random.key(0)).tokens
    stop = int(free[0][4])
    first = [list(tokens).index(stop) if stop in tokens else 10 for tokens in free]
    cut = generate(module, params, texts, Sampling(10, temperature=0.0, stop=(stop,)), jax.random.key(0))
    for tokens, whole, length in zip(cut.tokens, free, first, strict=True):
        np.testing.assert_array_equal(tokens, whole[:length])
    assert cut.stopped == [length < 10 for length in first]


def test_the_same_key_draws_the_same_and_another_differs(model):
    module, params = model
    call = lambda seed: generate(module, params, [[1, 2, 3]], Sampling(16, 1.0), jax.random.key(seed)).tokens[0]  # noqa: E731
    np.testing.assert_array_equal(call(0), call(0))
    assert not np.array_equal(call(0), call(1))


def test_budgets_of_one_bucket_share_a_program_and_a_shorter_one_is_a_beginning(model):
    module, params = model
    call = lambda budget: generate(module, params, [[1, 2, 3]], Sampling(budget, 1.0), jax.random.key(0)).tokens[0]  # noqa: E731
    longest, compiled = call(13), _loop._cache_size()
    for budget in (1, 2, 7, 12):
        np.testing.assert_array_equal(call(budget), longest[:budget])
    assert _loop._cache_size() == compiled
    assert len(call(BUCKET + 1)) == BUCKET + 1
    assert _loop._cache_size() == compiled + 1


@pytest.mark.parametrize(
    ("texts", "sampling", "message"),
    [
        ([], {}, "at least one"),
        ([[1], []], {}, "at least one token"),
        ([[VOCAB]], {}, "ids must lie in"),
        ([[-1]], {}, "ids must lie in"),
        ([[1] * 40], {"max_new_tokens": 9}, "max_length = 48"),
    ],
)
def test_bad_prompts_are_named(model, texts, sampling, message):
    module, params = model
    with pytest.raises(ConfigError, match=message):
        generate(module, params, texts, Sampling(**{"max_new_tokens": 3, **sampling}), jax.random.key(0))


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"vocab_size": 0}]
)
def test_bad_sampling_values_are_named(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)
