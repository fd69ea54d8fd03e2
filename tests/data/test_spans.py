"""T5's span corruption against a decoder that goes token by token, and its cuts against their enumeration."""

import itertools

import numpy as np
import pytest
from draws import BAR, standard_errors

from xylem.data import corruption, spans
from xylem.errors import ConfigError


def decoded(inputs, targets, vocab_size, sentinels, eos):
    """The text that inputs and targets spell, by the definition."""
    assert inputs[-1] == targets[-1] == eos
    spans_of, current = {}, None
    for token in targets[:-1].tolist():
        if token >= vocab_size - sentinels:
            current = spans_of.setdefault(token, [])
        else:
            current.append(token)
    assert list(spans_of) == [vocab_size - 1 - i for i in range(len(spans_of))]
    assert all(spans_of.values())
    text = []
    for token in inputs[:-1].tolist():
        text += spans_of.pop(token) if token >= vocab_size - sentinels else [token]
    assert not spans_of
    return text


def random_case(rng):
    """Tokens and settings that 100 sentinels are enough for."""
    vocab_size, length = int(rng.integers(150, 900)), int(rng.integers(2, 500))
    density, mean_span = float(rng.uniform(0, 0.6)), float(rng.uniform(3, 9))
    tokens = rng.integers(0, vocab_size - 100, length).astype(np.int32)
    return tokens, (vocab_size, int(rng.integers(0, 50)), density, mean_span)


def test_inputs_and_targets_rebuild_the_text(rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    wrong, noticed, trials = 0, 0, 200
    for _ in range(trials):
        tokens, (vocab_size, eos, density, mean_span) = random_case(rng)
        inputs, targets = spans.span_corruption(tokens, rng, vocab_size, eos, density, mean_span)
        assert inputs.dtype == targets.dtype == np.int32
        noise = max(1, round(density * len(tokens)))
        assert (targets < vocab_size - 100).sum() == noise + 1
        assert (targets >= vocab_size - 100).sum() == max(1, round(noise / mean_span))
        text = decoded(inputs, targets, vocab_size, 100, eos)
        wrong += text != tokens.tolist() or spans.rebuild(inputs, targets, vocab_size).tolist() != text
        forgetful = np.delete(targets, 1)  # the first token of the first span
        noticed += spans.rebuild(inputs, forgetful, vocab_size).tolist() != tokens.tolist()
    assert noticed == trials
    row, oracle = "T5 span corruption: text rebuilt", "a decoder by the definition, share of texts that differ"
    proof(row, oracle, wrong / trials, 0, rng_seed, "one token missing in the targets")


def test_all_cuts_are_equally_likely(rng_seed, proof, monkeypatch):
    tokens = np.arange(10, dtype=np.int32)  # 5 of text and 5 of noise, 2 spans each: 4 x 4 ways to cut
    ways = list(itertools.product(range(1, 5), repeat=2))

    def error():
        counts = np.zeros(16)
        for index in range(6000):
            rng = corruption.generator(rng_seed, 0, index)
            inputs, targets = spans.span_corruption(tokens, rng, 120, 15, noise_density=0.5, mean_span=2.5)
            assert inputs[-2] == 118 and targets[0] == 119  # text comes first, noise last
            ahead = (int(np.argmax(inputs == 119)), int(np.argmax(targets == 118)) - 1)
            counts[ways.index(ahead)] += 1
        return standard_errors(counts, np.full(16, 1 / 16))

    right = error()
    halved = lambda total, count, rng: rng.multinomial(total - count, np.full(count, 1 / count)) + 1  # noqa: E731
    monkeypatch.setattr(spans, "_segments", halved)
    assert error() > BAR
    row, fault = "T5 span corruption: where a text is cut", "each token picks its span by itself"
    proof(row, "enumeration of all cuts, standard errors", right, BAR, rng_seed, fault)


def test_lengths_are_those_of_t5():
    assert spans.lengths(512) == (568, 114)


def test_lengths_are_the_longest_text_that_fits(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for _ in range(40):
        size, density, mean_span = int(rng.integers(2, 300)), float(rng.uniform(0, 0.7)), float(rng.uniform(1, 8))
        length, targets_length = spans.lengths(size, density, mean_span)
        settings = (rng, 1000, 1, density, mean_span, 700)
        inputs, targets = spans.span_corruption(np.zeros(length, np.int32), *settings)
        assert len(inputs) <= size and len(targets) == targets_length
        longer, _ = spans.span_corruption(np.zeros(length + 1, np.int32), *settings)
        assert len(longer) > size


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_too_short_to_cut_is_left_whole(length):
    tokens = np.full(length, 5, np.int32)
    inputs, targets = spans.span_corruption(tokens, np.random.default_rng(0), 200, 1)
    assert (inputs.tolist(), targets.tolist()) == ([5] * length + [1], [1])
    assert spans.rebuild(inputs, targets, 200).tolist() == tokens.tolist()


def test_even_a_text_of_noise_alone_keeps_a_token_before_each_span(rng_seed):
    inputs, targets = spans.span_corruption(
        np.arange(10, dtype=np.int32), np.random.default_rng(rng_seed), 200, 50, noise_density=1.0, mean_span=1.0
    )
    assert inputs.tolist() == [0, 199, 50]
    assert targets.tolist() == [199, *range(1, 10), 50]


def test_mixing_rates_equal_their_definition(rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    sizes = [int(size) for size in 10 ** rng.uniform(2, 9, 7)]
    limit, temperature = float(sorted(sizes)[3]), float(rng.uniform(1.5, 4))

    def expected(limit, temperature):
        raised = [min(size, limit) ** (1 / temperature) for size in sizes]
        return np.array([one / sum(raised) for one in raised])

    errors = [
        np.max(np.abs(spans.mixing_rates(sizes, *settings) / expected(*settings) - 1))
        for settings in [(float("inf"), 1.0), (limit, 1.0), (limit, temperature)]
    ]
    assert np.max(np.abs(spans.mixing_rates(sizes, limit, temperature) / expected(limit, 1.0) - 1)) > 1e-3
    assert np.allclose(spans.mixing_rates([10, 90, 3000], limit=100.0), [0.05, 0.45, 0.5])
    assert np.allclose(spans.mixing_rates(sizes, temperature=1e9), 1 / 7)
    row = "T5 mixing rates: limit and temperature"
    proof(row, "1910.10683, 3.5.2, relative", max(errors), 1e-12, rng_seed, "temperature left out")


def test_task_inputs_are_those_of_appendix_d():
    assert spans.task_input("summarize", "marouane fellaini") == "summarize: marouane fellaini"
    assert spans.task_input("translate English to German", "Hi.") == "translate English to German: Hi."
    asked = spans.task_input("mnli", hypothesis="The St. Louis Cardinals won.", premise="yeah well")
    assert asked == "mnli hypothesis: The St. Louis Cardinals won. premise: yeah well"
    assert spans.task_input("cola", sentence="John made Bill.") == "cola sentence: John made Bill."


TOKENS = np.arange(60, dtype=np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rng: spans.span_corruption(TOKENS, rng, 200, 1, 1.2), "noise_density: 1.2 is not possible; a fraction"),
        (lambda rng: spans.span_corruption(TOKENS, rng, 200, 1, mean_span=0.5), "mean_span: 0.5 is not possible"),
        (
            lambda rng: spans.span_corruption(TOKENS, rng, 99, 1),
            "sentinels: 100 is not possible; at least 1, and fewer",
        ),
        (lambda rng: spans.span_corruption(TOKENS, rng, 200, 1, sentinels=0), "sentinels: 0 is not possible"),
        (
            lambda rng: spans.span_corruption(TOKENS, rng, 200, 1, sentinels=2),
            "sentinels: 2 is not possible; at least 3: that many spans come out of 60 tokens",
        ),
        (lambda rng: spans.span_corruption(TOKENS, rng, 200, 100), "eos: 100 is not possible; an id of the vocabulary"),
        (lambda rng: spans.span_corruption(TOKENS, rng, 159, 1), "token id: 59 is not possible; a text has ids from 0"),
        (lambda rng: spans.lengths(1), "inputs_length: 1 is not possible"),
        (lambda rng: spans.lengths(9, 1.0), "noise_density: 1.0 is not possible; below 1"),
        (lambda rng: spans.mixing_rates([]), "sizes: [] is not possible"),
        (lambda rng: spans.mixing_rates([3, 0]), "sizes: [3, 0] is not possible"),
        (lambda rng: spans.mixing_rates([3], limit=0.0), "limit: 0.0 is not possible"),
        (lambda rng: spans.mixing_rates([3], temperature=0.0), "temperature: 0.0 is not possible"),
        (lambda rng: spans.task_input("cola"), "fields: [] is not possible"),
        (lambda rng: spans.task_input("cola", "a", sentence="b"), "fields: ['sentence'] is not possible"),
    ],
)
def test_spans_name_what_cannot_work(call, message):
    with pytest.raises(ConfigError) as error:
        call(np.random.default_rng(0))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "targets", [[198, 5, 199, 6, 1], [199, 5, 1], [7, 199, 5, 198, 6, 1], [199, 5, 198, 6, 197, 1]]
)
def test_rebuild_refuses_targets_of_other_inputs(targets):
    inputs = np.array([2, 199, 3, 198, 1], np.int32)
    with pytest.raises(ConfigError, match=r"targets: .* a list of spans behind the sentinels \[199, 198\]"):
        spans.rebuild(inputs, np.array(targets, np.int32), 200)
