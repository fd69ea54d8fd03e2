"""Masked language modelling: who is chosen, what becomes of the chosen, and that the draw belongs to the window."""

import numpy as np
import pytest
from draws import BAR, histogram, standard_errors

from xylem.data import corruption, masking
from xylem.errors import ConfigError

SPECIAL, MASK, VOCABULARY = (0, 3, 8, 40), 7, 41
ORDINARY = np.setdiff1d(np.arange(VOCABULARY), [*SPECIAL, MASK])


def ordinary_window(rng, length):
    return rng.choice(ORDINARY, length).astype(np.int32)


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_masking_shares_are_80_10_10(max_ngram, rng_seed, proof):
    tokens = ordinary_window(np.random.default_rng(rng_seed), 200_000)

    def error(**shares):
        rng = corruption.generator(rng_seed, 1, 2)
        inputs, labels, weights = masking.mask_tokens(
            tokens, rng, SPECIAL, MASK, VOCABULARY, max_ngram=max_ngram, **shares
        )
        assert np.array_equal(labels, tokens) and np.array_equal(inputs[weights == 0], tokens[weights == 0])
        new, old = inputs[weights == 1], tokens[weights == 1]
        changed = new[(new != MASK) & (new != old)]
        assert np.isin(changed, ORDINARY).all()
        same = 0.1 / len(ORDINARY)  # one random token in that many is the one that was there
        fates = [(new == MASK).sum(), len(changed), (new == old).sum()]
        ids = np.bincount(np.searchsorted(ORDINARY, changed), minlength=len(ORDINARY))
        evenly = standard_errors(ids, np.full(len(ORDINARY), 1 / len(ORDINARY)))
        return max(standard_errors(fates, [0.8, 0.1 - same, 0.1 + same]), evenly)

    assert error(masked=0.7, random=0.2) > BAR
    row = f"masking: 80/10/10 and random ids, n-grams up to {max_ngram}"
    proof(row, "1810.04805 A.1, standard errors", error(), BAR, rng_seed, "70/20/10")


def test_masking_chooses_15_percent_evenly_and_nothing_special(rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    tokens = ordinary_window(rng, 47)
    tokens[rng.choice(47, 6, replace=False)] = [*SPECIAL, MASK, MASK]
    ordinary = np.isin(tokens, ORDINARY)

    def error(choose):
        counts = np.zeros(47)
        for index in range(6000):
            weights = choose(corruption.generator(rng_seed, 0, index))
            assert weights.sum() == 6 and not weights[~ordinary].any()  # round(0.15 * 41)
            counts += weights
        # At a place each window is a draw of its own, chosen or not.
        return max(standard_errors([count, 6000 - count], [6 / 41, 35 / 41]) for count in counts[ordinary])

    def from_two_halves(generator):
        """Three of the first 20 ordinary tokens, three of the other 21."""
        places = np.flatnonzero(ordinary)
        weights = np.zeros(47)
        weights[generator.choice(places[:14], 3, replace=False)] = 1
        weights[generator.choice(places[14:], 3, replace=False)] = 1
        return weights

    def ours(generator):
        return masking.mask_tokens(tokens, generator, SPECIAL, MASK, VOCABULARY)[2]

    assert error(from_two_halves) > BAR
    row = "masking: every ordinary token chosen at 15%"
    proof(row, "1810.04805 A.1, standard errors", error(ours), BAR, rng_seed, "as many from the first third")


@pytest.mark.parametrize("ordinary", [0, 1, 2, 3, 10, 11, 50, 511])
def test_masking_count_is_rounded_and_at_least_one(ordinary, rng_seed):
    rng = np.random.default_rng(rng_seed)
    tokens = rng.permutation(np.append(ordinary_window(rng, ordinary), np.full(5, SPECIAL[0]))).astype(np.int32)
    for rate in (0.0, 0.01, 0.15, 0.4, 1.0):
        for max_ngram in (1, 2, 5):
            chosen = masking.mask_tokens(tokens, rng, SPECIAL, MASK, VOCABULARY, rate, max_ngram=max_ngram)[2].sum()
            assert chosen == (max(1, round(rate * ordinary)) if rate and ordinary else 0)


def law_of_runs(law, rate, last):
    """P(a run of neighbouring chosen tokens has length 1, 2, ... last - 1, at least last) in a long window.

    n-grams that touch look like one run. In a random arrangement of m of them among s other tokens, the next one
    follows at once with probability m / (m + s): a run joins a geometric number of n-grams.
    """
    n_grams = rate / np.dot(law, np.arange(1, len(law) + 1))
    joined = n_grams / (n_grams + 1 - rate)
    one = np.append(0, law)
    runs, some = np.zeros(400), np.array([1.0])
    for count in range(1, 60):
        some = np.convolve(some, one)
        runs[: len(some)] += (1 - joined) * joined ** (count - 1) * some
    return np.append(runs[1:last], runs[last:].sum())


def test_ngram_lengths_follow_1_over_n(rng_seed, proof):
    tokens = ordinary_window(np.random.default_rng(rng_seed), 300_000)
    law = np.array([6, 3, 2]) / 11

    def error(max_ngram):
        rng = corruption.generator(rng_seed, 3, 4)
        weights = masking.mask_tokens(tokens, rng, SPECIAL, MASK, VOCABULARY, max_ngram=max_ngram)[2]
        edges = np.flatnonzero(np.diff(weights, prepend=0, append=0))
        return standard_errors(histogram(edges[1::2] - edges[::2], 6)[1:], law_of_runs(law, 0.15, 6))

    assert error(2) > BAR
    row, fault = "masking: p(n) of n-grams, n up to 3", "n up to 2"
    proof(row, "law of the runs under 1/n (1909.11942), standard errors", error(3), BAR, rng_seed, fault)


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_words_are_chosen_whole(max_ngram, rng_seed):
    rng = np.random.default_rng(rng_seed)
    for _ in range(30):
        tokens = np.where(rng.random(120) < 0.1, SPECIAL[1], ordinary_window(rng, 120)).astype(np.int32)
        continues = rng.random(120) < 0.5
        settings = (SPECIAL, MASK, VOCABULARY, 0.2)
        weights = masking.mask_tokens(tokens, rng, *settings, max_ngram=max_ngram, continues=continues)[2]
        words = []
        for place in range(120):
            if tokens[place] in ORDINARY:
                if continues[place] and words:
                    words[-1].append(place)
                else:
                    words.append([place])
        chosen = [word for word in words if weights[word].all()]
        assert sum(map(len, chosen)) == weights.sum()
        assert len(chosen) == max(1, round(0.2 * len(words)))


def test_dynamic_masks_differ_by_epoch_survive_resume_and_know_no_hosts(rng_seed):
    import grain

    rng = np.random.default_rng(rng_seed)
    windows = [ordinary_window(rng, 64) for _ in range(7)]

    def masked(place, window):
        generator = corruption.generator(rng_seed, int(place) // len(windows), int(place) % len(windows))
        return masking.mask_tokens(window, generator, SPECIAL, MASK, VOCABULARY)[0]

    stream = grain.MapDataset.source(windows).repeat(3).map_with_index(masked)
    whole = [row.tolist() for row in stream]
    by_epoch = np.array(whole).reshape(3, len(windows), 64)
    assert all((by_epoch[a] != by_epoch[b]).any(axis=1).all() for a, b in [(0, 1), (0, 2), (1, 2)])
    hosts = [[row.tolist() for row in stream[host::3]] for host in range(3)]
    assert [row for rows in zip(*hosts, strict=True) for row in rows] == whole
    iterator = iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    resumed = iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
    resumed.set_state(state)
    assert [row.tolist() for row in resumed] == whole[5:]


def test_masking_leaves_its_input_alone(rng_seed):
    tokens = ordinary_window(np.random.default_rng(rng_seed), 40)
    before = tokens.copy()
    inputs, labels, weights = masking.mask_tokens(tokens, np.random.default_rng(1), SPECIAL, MASK, VOCABULARY, 1.0)
    assert np.array_equal(tokens, before) and np.array_equal(labels, before)
    assert (inputs.dtype, labels.dtype, weights.dtype) == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 1.5}, "rate: 1.5 is not possible; a fraction from 0 to 1"),
        ({"rate": float("nan")}, "rate: nan is not possible; a fraction from 0 to 1"),
        ({"masked": -0.1}, "masked: -0.1 is not possible; a fraction from 0 to 1"),
        ({"masked": 0.8, "random": 0.3}, "random: 0.3 is not possible; a fraction from 0 to 0.2: 0.8 are masked"),
        ({"max_ngram": 0}, "max_ngram: 0 is not possible; a whole number, at least 1"),
        ({"mask_id": 41}, "mask_id: 41 is not possible; an id of the vocabulary: 0 to 40"),
        ({"special": (0, 99)}, "special: 99 is not possible; an id of the vocabulary: 0 to 40"),
        ({"special": (1, 0), "mask_id": 2, "vocab_size": 3}, "vocab_size: 3 is not possible; more than the 3 special"),
    ],
)
def test_masking_names_what_cannot_work(values, message):
    settings = {"special": SPECIAL, "mask_id": MASK, "vocab_size": VOCABULARY} | values
    with pytest.raises(ConfigError) as error:
        masking.mask_tokens(np.ones(9, np.int32), np.random.default_rng(0), **settings)
    assert str(error.value).startswith(message)
