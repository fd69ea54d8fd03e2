"""BART's corruptions: span lengths against the Poisson law, and what each must leave as it was."""

from functools import partial

import numpy as np
import pytest
from draws import BAR, histogram, standard_errors
from scipy.stats import poisson

from xylem.data import corruption, denoising
from xylem.errors import ConfigError

MASK = 0


def distinct(rng, length):
    """A document in which every token is another one, and none the mask."""
    return (rng.permutation(2 * length)[:length] + 1).astype(np.int32)


def test_infilled_spans_are_poisson(rng_seed, proof):
    tokens = np.arange(1, 300_001, dtype=np.int32)

    def error(mean_span):
        out = denoising.text_infilling(tokens, corruption.generator(rng_seed, 0, 1), MASK, mean_span=mean_span)
        left, mask, right = out[:-2], out[1:-1], out[2:]
        alone = (mask == MASK) & (left != MASK) & (right != MASK)  # whether masks touch says nothing of their lengths
        lengths = right[alone] - left[alone] - 1
        law = poisson.pmf(np.arange(9), 3)
        return standard_errors(histogram(lengths, 9), np.append(law, 1 - law.sum()))

    assert error(2.0) > BAR
    row, oracle = "BART text infilling: span lengths", "scipy.stats.poisson(3), standard errors"
    proof(row, oracle, error(3.0), BAR, rng_seed, "mean 2")


def test_infilling_takes_30_percent_and_puts_one_mask_a_span(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for length in [0, 1, 2, 3, 10, *rng.integers(11, 400, 40)]:
        tokens = distinct(rng, int(length))
        out = denoising.text_infilling(tokens, rng, MASK)
        kept = out[out != MASK]
        assert len(kept) == length - int(np.ceil(3 * length / 10))
        places = np.searchsorted(np.sort(tokens), kept)
        order = np.argsort(tokens)[places]
        assert (np.diff(order) > 0).all()  # what is left stands in its old order
        edges = np.flatnonzero(np.diff(order, prepend=-1, append=length) > 1)
        gaps = np.split(out, np.flatnonzero(out != MASK))  # a gap's masks follow the token before it
        assert all((gaps[edge] == MASK).any() for edge in edges)


@pytest.mark.parametrize("length", [1, 7, 60, 61])
def test_masking_and_deletion_take_their_share_evenly(length, rng_seed):
    rng = np.random.default_rng(rng_seed)
    tokens, counts, trials = distinct(rng, length), np.zeros((2, length)), 3000
    share = int(np.ceil(15 * length / 100))
    for _ in range(trials):
        masked, shorter = denoising.token_masking(tokens, rng, MASK), denoising.token_deletion(tokens, rng)
        left = np.isin(tokens, shorter)
        assert shorter.tolist() == tokens[left].tolist() and (~left).sum() == share
        assert masked[masked != MASK].tolist() == tokens[masked != MASK].tolist() and (masked == MASK).sum() == share
        counts += [masked == MASK, ~left]
    if length == 1:
        assert (counts == trials).all()
        return
    for count in counts.ravel():
        assert standard_errors([count, trials - count], [share / length, 1 - share / length]) <= BAR


def sentences_of(tokens, stops):
    """Sentences by the definition: one ends where a stop is not followed by another."""
    sentences, current = [], []
    for place, token in enumerate(tokens):
        current.append(token)
        if token in stops and not (place + 1 < len(tokens) and tokens[place + 1] in stops):
            sentences.append(current)
            current = []
    return [*sentences, current] if current else sentences


def test_permutation_keeps_every_sentence(rng_seed, proof):
    rng = np.random.default_rng(rng_seed)

    def broken(permute, tokens, stops):
        """Whether the outcome is anything but the sentences, each once, in some order."""
        by_first = {sentence[0]: sentence for sentence in sentences_of(tokens.tolist(), stops)}
        out = permute(tokens).tolist()
        while out and (sentence := by_first.pop(out[0], None)) and out[: len(sentence)] == sentence:
            out = out[len(sentence) :]
        return bool(out or by_first)

    wrong = []
    for _ in range(200):
        tokens = distinct(rng, int(rng.integers(100, 200)))
        stops = set(rng.choice(tokens, int(rng.integers(1, 60)), replace=False).tolist())
        wrong.append(broken(lambda it, stops=stops: denoising.sentence_permutation(it, rng, stops), tokens, stops))
    assert broken(rng.permutation, tokens, stops)
    row, oracle = "BART sentence permutation", "sentences split token by token, share of documents broken"
    proof(row, oracle, np.mean(wrong), 0, rng_seed, "tokens permuted, not sentences")


def test_permutation_makes_all_orders_equally_likely(rng_seed):
    rng = np.random.default_rng(rng_seed)
    document = np.array([5, 1, 6, 6, 1, 1, 7], np.int32)
    outcomes = [tuple(denoising.sentence_permutation(document, rng, [1]).tolist()) for _ in range(6000)]
    _, counts = np.unique(outcomes, axis=0, return_counts=True)
    assert len(counts) == 6
    assert standard_errors(counts, np.full(6, 1 / 6)) <= BAR


def test_rotation_begins_with_any_token_equally_often(rng_seed):
    rng = np.random.default_rng(rng_seed)
    document, counts = distinct(rng, 13), np.zeros(13)
    for _ in range(6000):
        out = denoising.document_rotation(document, rng)
        start = document.tolist().index(out[0])
        assert out.tolist() == [*document[start:], *document[:start]]
        counts[start] += 1
    assert standard_errors(counts, np.full(13, 1 / 13)) <= BAR


def test_composition_is_one_function_after_another(rng_seed):
    document = distinct(np.random.default_rng(rng_seed), 90)
    stops = document[::9].tolist()
    first, second = np.random.default_rng(rng_seed), np.random.default_rng(rng_seed)
    permuted = denoising.sentence_permutation(document, second, stops)
    expected = denoising.text_infilling(permuted, second, MASK)
    assert denoising.bart(MASK, stops)(document, first).tolist() == expected.tolist()
    assert denoising.compose()(document, first) is document


def test_denoising_keeps_its_type_and_its_input(rng_seed):
    rng = np.random.default_rng(rng_seed)
    document = distinct(rng, 50)
    before = document.copy()
    every = [
        partial(denoising.token_masking, mask_id=MASK),
        denoising.token_deletion,
        partial(denoising.sentence_permutation, stops=before[::7].tolist()),
        denoising.document_rotation,
        partial(denoising.text_infilling, mask_id=MASK),
    ]
    for function in [*every, denoising.compose(*every)]:
        assert function(document, rng).dtype == np.int32
        assert document.tolist() == before.tolist()
        assert function(document[:0], rng).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(denoising.token_masking, mask_id=MASK, rate=-0.1), "rate: -0.1 is not possible; a fraction from 0"),
        (partial(denoising.token_deletion, rate=2.0), "rate: 2.0 is not possible; a fraction from 0 to 1"),
        (partial(denoising.text_infilling, mask_id=MASK, rate=1.1), "rate: 1.1 is not possible; a fraction from 0"),
        (partial(denoising.text_infilling, mask_id=MASK, mean_span=0.0), "mean_span: 0.0 is not possible; a positive"),
    ],
)
def test_denoising_names_what_cannot_work(call, message):
    with pytest.raises(ConfigError) as error:
        call(np.ones(9, np.int32), np.random.default_rng(0))
    assert str(error.value).startswith(message)
