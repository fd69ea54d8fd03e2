"""Batch sizes against a walk through the run, at every step, and the rows of each step."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from documents import LENGTH, rows_of

from xylem.data import pipeline
from xylem.data.ramp import BatchRamp
from xylem.errors import ConfigError


def walked(ramp: BatchRamp, steps: int) -> tuple[list[int], list[int]]:
    """Micro-batches of each step and tokens before it, one step after the other, in fractions."""
    sizes, read = [], [0]
    for _ in range(steps):
        share = min(Fraction(1), Fraction(read[-1], ramp.ramp_tokens)) if ramp.ramp_tokens else Fraction(1)
        sizes.append(math.floor(ramp.start + (ramp.full - ramp.start) * share))
        read.append(read[-1] + sizes[-1] * ramp.micro_tokens)
    return sizes, read


def random_ramps(seed: int) -> list[BatchRamp]:
    rng = np.random.default_rng(seed)
    ramps = [BatchRamp(1, 100, 32_000, 40_000_000), BatchRamp(3, 3, 7, 1000), BatchRamp(2, 9, 5, 0)]
    for _ in range(60):
        start, micro = int(rng.integers(1, 6)), int(rng.integers(1, 50))
        ramps.append(BatchRamp(start, start + int(rng.integers(0, 40)), micro, int(rng.integers(0, 20_000))))
    return ramps


def test_batch_ramp_equals_a_walk_through_the_run(rng_seed, proof):
    wrong = late = 0
    for ramp in random_ramps(rng_seed):
        sizes, read = walked(ramp, 600)
        found = [ramp.micro_batches(step) for step in range(600)]
        wrong += found != sizes
        late += [found[0], *found[:-1]] != sizes
        assert [ramp.tokens_before(step) for step in range(601)] == read, ramp
        assert ramp.micro_batches_before(600) * ramp.micro_tokens == read[-1]
    assert late > 0
    proof("batch ramp: micro-batches of every step", "a walk in fractions", wrong, 0, rng_seed, "a step too late")


def test_batch_ramp_knows_the_steps_of_a_token_budget(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for ramp in random_ramps(rng_seed):
        _, read = walked(ramp, 300)
        for budget in [0, 1, *read[1:8], *(int(x) for x in rng.integers(0, read[-1], 20))]:
            assert ramp.steps(budget) == next(step for step, tokens in enumerate(read) if tokens >= budget), ramp


def test_batch_ramp_of_gpt3_is_linear_in_tokens():
    # 2005.14165, table 2.1 and appendix B: 32 thousand to 3.2 million tokens, over 4 to 12 billion, 300 billion in all.
    ramp = BatchRamp(start=1, full=100, micro_tokens=32_000, ramp_tokens=12 * 10**9)
    steps = ramp.steps(300 * 10**9)
    for billions in (0, 3, 6, 9):
        size = ramp.micro_batches(ramp.steps(billions * 10**9)) * ramp.micro_tokens
        assert size == pytest.approx(32_000 + 3_168_000 * billions / 12, abs=32_000)
    assert ramp.micro_batches(steps - 1) == 100
    assert ramp.tokens_before(steps - 1) < 300 * 10**9 <= ramp.tokens_before(steps)
    # Each of 99 sizes reads a 99th of the ramp: k micro-batches need 1/k of the steps that one would.
    alone = 12e9 / 99 / 32_000
    assert ramp.steps(12 * 10**9) == pytest.approx(alone * sum(1 / size for size in range(1, 100)), rel=0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 2, 3, 4), "ramp.start: 0"),
        ((3, 2, 3, 4), "ramp.full: 2"),
        ((1, 2, 0, 4), "ramp.micro_tokens: 0"),
        ((1, 2, 3, -1), "ramp.ramp_tokens: -1"),
    ],
)
def test_batch_ramps_that_cannot_be_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        BatchRamp(*values)


FULL, ROWS = 5, 4  # micro-batches of the full batch, rows of each


def own_rows(batch: dict, taken: int) -> dict:
    """The rows of a step in the order they were read; asserts that all others are empty."""
    cut = {name: x.reshape(-1, FULL, *x.shape[1:]) for name, x in batch.items()}
    assert not any(x[:, taken:].any() for x in cut.values())
    return {name: x[:, :taken].reshape(-1, *x.shape[2:]) for name, x in cut.items()}


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_ramped_run_reads_the_rows_of_the_plain_one_in_its_order(hosts, prepared, rng_seed):
    ramp = BatchRamp(2, FULL, ROWS * LENGTH, 20 * FULL * ROWS * LENGTH)
    settings = {"ramp": ramp, "process_count": hosts}
    parts = [
        pipeline.TrainIterator(prepared, FULL * ROWS, rng_seed, process_index=host, **settings) for host in range(hosts)
    ]
    seen, sizes = [], []
    for step in range(40):
        read = [own_rows(next(part), ramp.micro_batches(step)) for part in parts]
        whole = np.stack([each["tokens"] for each in read], axis=1).reshape(-1, LENGTH)  # host h has every H-th
        assert all((each["weights"].any(axis=1)).all() for each in read)
        seen.append(whole)
        sizes.append(len(whole))
    assert sizes == [ramp.micro_batches(step) * ROWS for step in range(40)]
    assert sizes[0] == 2 * ROWS and sizes[-1] == FULL * ROWS and len(set(sizes)) == FULL - 1
    plain = rows_of(pipeline.TrainIterator(prepared, 1, rng_seed), sum(sizes))
    np.testing.assert_array_equal(np.concatenate(seen), plain)


@pytest.mark.parametrize("stop", [1, 13, 60])
def test_a_ramped_run_goes_on_where_it_stopped(stop, prepared, rng_seed):
    ramp = BatchRamp(1, FULL, ROWS * LENGTH, 2000)
    make = lambda start: pipeline.TrainIterator(prepared, FULL * ROWS, rng_seed, start, ramp=ramp)  # noqa: E731
    whole, later = make(0), make(stop)
    for _ in range(stop):
        next(whole)
    resumed = make(0)
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    for _ in range(3):
        expected, *others = (next(each) for each in (whole, later, resumed))
        for other in others:
            np.testing.assert_array_equal(other["tokens"], expected["tokens"])


def test_a_micro_batch_that_hosts_do_not_divide_is_refused(prepared):
    ramp = BatchRamp(1, FULL, 3 * LENGTH, 100)
    with pytest.raises(ConfigError, match="batch_size: 3 is not possible; a positive multiple of the 2 hosts"):
        pipeline.TrainIterator(prepared, 3 * FULL, 0, ramp=ramp, process_count=2)
