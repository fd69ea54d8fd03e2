"""The n-gram model as a network: the same numbers under jit, a cache that forgets, and what it writes."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ngrams import SMOOTHINGS, draw_case
from operations import apart
from scipy.stats import chi2

from xylem.data import tokenizers
from xylem.generation.generator import Generator
from xylem.generation.sampling import Sampling, generate
from xylem.models import ngram
from xylem.models.ngram import NGramConfig
from xylem.models.ngram_lm import NGramLM

TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()


@pytest.fixture
def model(rng_seed):
    config, documents, _ = draw_case(np.random.default_rng(rng_seed), "kneser_ney", 4)
    config = NGramConfig(config.vocab_size, config.end_of_text, 4)
    tree = ngram.count(documents, config)
    return NGramLM(config), tree, jax.tree.map(jnp.asarray, tree)


def random_tokens(module, seed, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, module.config.vocab_size)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_logits_equal_the_numpy_log_probs(smoothing, rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    config, documents, others = draw_case(rng, smoothing, 4)
    tree = ngram.count(documents, config)
    module, params = NGramLM(config), jax.tree.map(jnp.asarray, tree)
    text = np.array([config.end_of_text, *documents[0], *others[0]], np.int32)
    logits = np.asarray(jax.jit(module.apply)({"params": params}, jnp.asarray(text)[None]).logits[0], np.float64)
    contexts = ngram.predictions([text[1:]], config)[0]
    expected = ngram.log_distribution(config, tree, contexts)
    assert logits.shape == expected.shape and (np.isfinite(logits) == np.isfinite(expected)).all()
    finite = np.isfinite(expected)
    error = apart(logits[finite], expected[finite])
    late = ngram.log_distribution(config, tree, np.roll(contexts, 1, axis=0))
    assert not np.allclose(np.exp(late), np.exp(expected), atol=1e-3)
    row = f"n-gram: logits under jit, {smoothing}"
    proof(row, "NumPy in float64", error, 1e-5, rng_seed, "contexts one token late")


@partial(jax.jit, static_argnames="module")
def read(module, params, tokens, segments=None, cache=None):
    """The contexts after each token, and the cache; no probability is looked up."""
    out = module.apply({"params": params}, tokens, segments=segments, cache=cache)
    return out.hidden, out.cache


def test_cached_contexts_are_those_of_the_whole_row(model, rng_seed):
    module, _, params = model
    tokens = random_tokens(module, rng_seed, 3, 13)
    whole, _ = read(module, params, tokens)
    first, cache = read(module, params, tokens[:, :6], cache=module.init_cache(3, 13))
    second, full = read(module, params, tokens[:, 6:], cache=cache)
    assert bool((jnp.concatenate([first, second], axis=1) == whole).all())
    assert full.lengths.tolist() == [13] * 3 and full.capacity == 13
    rows = jnp.array([2, 0, 1])
    chosen, _ = read(module, params, tokens[rows, 6:], cache=cache.select(rows))
    assert bool((chosen == whole[rows, 6:]).all())


def test_cache_rewinds_and_forgets_padding(model, rng_seed):
    module, _, params = model
    end, lengths = module.config.end_of_text, jnp.array([5, 2, 4])
    # No end-of-text and no token twice in a row: a context one token off is another.
    words = jnp.roll(jnp.array([token for token in range(module.config.vocab_size) if token != end]), rng_seed % 7)
    tokens = jnp.stack([jnp.tile(words, 2)[start : start + 13] for start in (0, 1, 3)])
    expected = []
    for row, length in enumerate(lengths.tolist()):
        seen = jnp.concatenate([tokens[row, :length], tokens[row, :2], jnp.zeros(9 - length, jnp.int32)])[None]
        expected.append(read(module, params, seen)[0][0, length : length + 2])
    expected = jnp.stack(expected)
    real = (jnp.arange(13)[None] < lengths[:, None]).astype(jnp.int32)
    _, padded = read(module, params, tokens, real, module.init_cache(3, 13))
    _, full = read(module, params, tokens, jnp.ones_like(real), module.init_cache(3, 13))
    assert padded.lengths.tolist() == lengths.tolist() and full.lengths.tolist() == [13] * 3
    after = lambda cache: read(module, params, tokens[:, :2], cache=cache)[0]  # noqa: E731
    assert bool((after(padded) == expected).all())
    assert bool((after(full.rewind(lengths)) == expected).all())
    assert not bool((after(full.rewind(lengths - 1)) == expected).all())


def test_packed_documents_are_read_as_if_alone(model, rng_seed):
    module, _, params = model
    word = (module.config.end_of_text + 1) % module.config.vocab_size
    tokens = random_tokens(module, rng_seed, 1, 12).at[0, 3:5].set(word)  # no end-of-text parts these documents
    hidden, _ = read(module, params, tokens, jnp.array([[1] * 4 + [2] * 6 + [0] * 2]))
    for part in (slice(0, 4), slice(4, 10)):
        assert bool((hidden[:, part] == read(module, params, tokens[:, part])[0]).all())
    assert not bool((hidden == read(module, params, tokens)[0]).all())


def test_generated_pairs_follow_the_distribution(rng_seed, proof):
    config = NGramConfig(7, 0, 3)
    tree = ngram.count([[1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 2, 1, 2], [1, 2, 2, 4, 3, 1, 5], [3, 1, 2, 5]], config)
    sampling, count = Sampling(2, temperature=0.8, top_k=4), 8000
    args = (NGramLM(config), jax.tree.map(jnp.asarray, tree), [[4, 0, 3, 1]] * count, sampling)
    pairs = np.stack(generate(*args, jax.random.key(rng_seed)).tokens)

    def sharpened(context):
        """The sampler's meaning in NumPy: temperature, then the four likeliest and what equals the fourth."""
        p = ngram.distribution(config, tree, np.array([context], np.int32))[0] ** (1 / 0.8)
        p[p < np.sort(p)[-4] * (1 - 1e-6)] = 0
        return p / p.sum()

    def p_value(second_context):
        second = np.stack([sharpened(second_context(token)) for token in range(7)])
        expected = (sharpened([3, 1])[:, None] * second).ravel() * count
        drawn = np.bincount(pairs[:, 0] * 7 + pairs[:, 1], minlength=49)
        if drawn[expected == 0].any():
            return 0.0
        drawn, expected = drawn[expected > 0], expected[expected > 0]
        return float(chi2.sf(((drawn - expected) ** 2 / expected).sum(), len(expected) - 1))

    # End-of-text begins a document, before which end-of-text is all there is.
    value, fault = p_value(lambda token: [1, token] if token else [0, 0]), p_value(lambda token: [3, 1])
    assert fault < 1e-6
    row = "n-gram: 8,000 pairs drawn"
    proof(row, "chi-square, 1 - p", 1 - value, 1 - 1e-6, rng_seed, "the first token not read")


def test_greedy_continues_unequal_prompts_and_stops(model, rng_seed):
    module, tree, params = model
    config, rng = module.config, np.random.default_rng(rng_seed)
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in (3, 9, 1)]
    drawn = generate(module, params, prompts, Sampling(7, temperature=0.0), jax.random.key(0))
    for prompt, tokens in zip(prompts, drawn.tokens, strict=True):
        text = np.array([*prompt, *tokens], np.int32)[None]
        places = np.arange(len(prompt) - 1, text.shape[1] - 1)[None]
        contexts = ngram.contexts_at(text, text == config.end_of_text, places, config)[0]
        p = ngram.distribution(config, tree, contexts)
        np.testing.assert_allclose(p[np.arange(7), tokens], p.max(axis=-1), rtol=1e-5)
    stop = int(drawn.tokens[0][3])
    cut = generate(module, params, prompts, Sampling(7, temperature=0.0, stop=(stop,)), jax.random.key(0))
    for tokens, whole in zip(cut.tokens, drawn.tokens, strict=True):
        places = np.flatnonzero(whole == stop)
        np.testing.assert_array_equal(tokens, whole[: places[0]] if len(places) else whole)


def test_generator_writes_what_an_unsmoothed_model_has_read():
    tokenizer = tokenizers.byte_level()
    config = NGramConfig(tokenizer.vocab_size, tokenizer.end_of_text, 7, "mle")
    params = jax.tree.map(jnp.asarray, ngram.count([tokenizer.encode(TEXT.decode())], config))
    start = "the License"
    [text] = Generator(NGramLM(config), params, tokenizer)([start], Sampling(60), jax.random.key(1))
    assert len(text) == 60
    whole = (start + text).encode()
    assert all(whole[at : at + 7] in TEXT for at in range(len(whole) - 6))


def test_inputs_that_it_cannot_read_are_refused(model):
    module, _, params = model
    tokens = jnp.zeros((1, 2), jnp.int32)
    for name, value in (("embeddings", jnp.zeros((1, 2, 3))), ("token_types", tokens)):
        with pytest.raises(ValueError, match=name):
            module.apply({"params": params}, tokens, **{name: value})
    with pytest.raises(ValueError, match="taps"):
        module.clone(taps=("block_out",)).apply({"params": params}, tokens)
