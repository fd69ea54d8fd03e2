"""Encoder-decoders write what stepwise recomputation writes; their limits are named; text goes in and out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xylem.data import tokenizers
from xylem.errors import ConfigError
from xylem.generation.generator import Generator
from xylem.generation.sampling import Sampling, generate
from xylem.models import build
from xylem.models.bart import bart
from xylem.models.settings import Compute
from xylem.models.t5 import t5
from xylem.models.vanilla import vanilla

VOCAB, LENGTH = 37, 24
PLAIN = Compute(layers="scan", kernels="plain")
CONFIGS = {
    "transformer": vanilla(2, 20, 5, VOCAB, LENGTH).with_compute(PLAIN),
    "bart": bart(2, 20, 5, VOCAB, LENGTH).with_compute(PLAIN),
    "t5": t5(2, 20, 3, 7, 29, "1.1", VOCAB, LENGTH).with_compute(PLAIN),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    module = build(CONFIGS[request.param])
    params = jax.jit(lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(jax.random.key(3))
    return module, jax.tree.map(lambda x: x * 2.0, params)  # far from uniform


def sources(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in (3, 11, 7)]


def test_greedy_equals_stepwise_recomputation_for_unequal_sources(model, rng_seed):
    module, params = model
    texts = sources(rng_seed)
    found = generate(module, params, texts, Sampling(9, temperature=0.0), jax.random.key(0))
    whole = jax.jit(lambda source, target: module.apply({"params": params}, source, target).logits)
    for text, tokens in zip(texts, found.tokens, strict=True):
        target = np.zeros((1, LENGTH), np.int32)
        target[0, 0] = module.config.decoder_start
        for place, token in enumerate(tokens):
            row = np.asarray(whole(jnp.array([text]), target))[0, place]  # a source alone, without padding or cache
            assert row[token] >= row.max() - 1e-4 * np.abs(row).max()
            target[0, place + 1] = token
    assert [len(tokens) for tokens in found.tokens] == [9, 9, 9] and not any(found.stopped)


def test_sampling_and_stop_tokens_are_those_of_decoders(model, rng_seed):
    module, params = model
    texts, key = sources(rng_seed), jax.random.key(rng_seed)
    drawn = generate(module, params, texts, Sampling(10, top_k=5, top_p=0.9), key)
    again = generate(module, params, texts, Sampling(10, top_k=5, top_p=0.9), key)
    other = generate(module, params, texts, Sampling(10, temperature=3.0), jax.random.key(rng_seed + 1))
    np.testing.assert_array_equal(drawn.tokens, again.tokens)
    assert not np.array_equal(drawn.tokens, other.tokens)
    stop = int(drawn.tokens[1][4])
    cut = generate(module, params, texts, Sampling(10, top_k=5, top_p=0.9, stop=(stop,)), key)
    for tokens, free, stopped in zip(cut.tokens, drawn.tokens, cut.stopped, strict=True):
        length = list(free).index(stop) if stop in free else 10
        np.testing.assert_array_equal(tokens, free[:length])
        assert stopped == (length < 10)


def test_a_target_fills_the_decoder_and_no_more(model):
    module, params = model
    full = generate(module, params, [[1, 2]], Sampling(LENGTH - 1, temperature=0.0), jax.random.key(0))
    assert len(full.tokens[0]) == LENGTH - 1
    with pytest.raises(
        ConfigError, match=f"max_new_tokens: '1 \\+ {LENGTH}'.* a target's start .* max_length = {LENGTH}"
    ):
        generate(module, params, [[1, 2]], Sampling(LENGTH), jax.random.key(0))
    with pytest.raises(ConfigError, match=f"prompts: '{LENGTH + 1} tokens'.* the encoder's max_length is {LENGTH}"):
        generate(module, params, [[1] * (LENGTH + 1)], Sampling(2), jax.random.key(0))


def test_generator_gives_a_text_with_its_end_and_reads_what_is_written():
    tokenizer = tokenizers.byte_level()
    module = build(bart(1, 16, 2, tokenizer.vocab_size, 48).with_compute(PLAIN))
    params = jax.jit(lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32))["params"])(jax.random.key(0))
    sampling = Sampling(6, temperature=0.0)
    end = tokenizer.end_of_text
    ids = [[end, *b"ab", end], [end, *b"a longer one", end]]
    stopped = replace(sampling, stop=(end,))
    expected = generate(module, params, ids, stopped, jax.random.key(0)).tokens
    found = Generator(module, params, tokenizer)(["ab", "a longer one"], sampling)
    assert found == [tokenizer.decode(tokens) for tokens in expected]
