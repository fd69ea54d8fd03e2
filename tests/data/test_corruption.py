"""The randomness of a window, and spans that are placed evenly."""

import itertools

import numpy as np
import pytest
from draws import BAR, histogram, standard_errors

from xylem.data import corruption
from xylem.errors import ConfigError


def test_generator_is_a_function_of_its_three_numbers(rng_seed):
    grid = list(itertools.product([0, 1, 2, rng_seed, 2**32, 2**64 - 1], repeat=3))
    first = {numbers: corruption.generator(*numbers).random(4).tolist() for numbers in grid}
    assert all(corruption.generator(*numbers).random(4).tolist() == first[numbers] for numbers in reversed(grid))
    assert len({number for numbers in first.values() for number in numbers}) == 4 * len(first)


def test_generator_is_philox_under_that_key_and_counter(rng_seed):
    plain = np.random.Philox(key=rng_seed + (3 << 64), counter=5 << 192)
    assert np.array_equal(corruption.generator(rng_seed, 3, 5).random(9), np.random.Generator(plain).random(9))


def test_generators_of_neighbours_are_independent(rng_seed):
    firsts = np.array([corruption.generator(rng_seed, epoch, i).integers(5) for epoch in range(60) for i in range(60)])
    for step in (1, 60):  # pairs of neighbouring windows, then of neighbouring epochs
        pairs = 5 * firsts[:-step] + firsts[step:]
        assert standard_errors(histogram(pairs, 24), np.full(25, 1 / 25)) <= BAR


@pytest.mark.parametrize(("field", "numbers"), [("seed", (-1, 0, 0)), ("epoch", (0, 2**64, 0)), ("index", (0, 0, -3))])
def test_generator_refuses_numbers_out_of_range(field, numbers):
    with pytest.raises(ConfigError, match=rf"^{field}: -?\d+ is not possible; a whole number from 0"):
        corruption.generator(*numbers)


def test_place_makes_all_arrangements_equally_likely(rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    lengths, total = np.array([2, 0, 1]), 6
    gaps = [g for g in itertools.product(range(4), repeat=4) if sum(g) == 3]
    starts = [tuple(np.cumsum(g[:3]) + np.cumsum(lengths) - lengths) for g in gaps]
    assert len(set(starts)) == 20

    def error(place):
        drawn = [starts.index(tuple(place())) for _ in range(12_000)]
        return standard_errors(histogram(drawn, 19), np.full(20, 1 / 20))

    def every_item_picks_a_gap():
        return np.cumsum(rng.multinomial(3, [1 / 4] * 4)[:3]) + np.cumsum(lengths) - lengths

    assert error(every_item_picks_a_gap) > BAR
    claim = "enumeration of all arrangements, standard errors"
    fault = "each item picks its gap by itself"
    proof("spans placed at random", claim, error(lambda: corruption.place(lengths, total, rng)), BAR, rng_seed, fault)


def test_span_lengths_cover_the_total_exactly(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for total in [0, 1, 2, *rng.integers(3, 300, 50)]:
        lengths = corruption.span_lengths(int(total), lambda count: rng.poisson(0.7, count), rng)
        assert lengths.sum() == total
        starts = corruption.place(lengths, 400, rng)
        covered = corruption.spread(starts, lengths)
        expected = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        assert covered.tolist() == expected
        assert len(set(expected)) == total and all(0 <= one < 400 for one in expected)


def test_span_lengths_leave_the_one_that_was_cut_no_place_of_its_own(rng_seed):
    rng = np.random.default_rng(rng_seed)
    cut = [corruption.span_lengths(13, lambda count: np.full(count, 4), rng).tolist().index(1) for _ in range(4000)]
    assert standard_errors(histogram(cut, 3), np.full(4, 1 / 4)) <= BAR


def test_share_is_not_raised_by_rounding():
    assert [corruption.share(100, rate) for rate in (0.07, 0.0701, 0.0, 1.0)] == [7, 8, 0, 100]
