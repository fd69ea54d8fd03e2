"""Learning rates against their closed forms, batch sizes against a walk through the run, at every step."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from xylem.errors import ConfigError
from xylem.training.config import OptimizerConfig
from xylem.training.schedules import BatchRamp, make_schedule

PEAK, STEPS, FINAL = 3e-3, 41, 0.1


def reference(name: str, step: int, warmup: int, decay_fraction: float) -> float:
    """Each schedule written out with one ``if`` a phase; ``STEPS - 1`` is the last step."""
    if name == "noam":
        turn = max(1, warmup)
        return PEAK * math.sqrt(turn) * min((step + 1) ** -0.5, (step + 1) * turn**-1.5)
    if step < warmup:
        return PEAK * (step + 1) / warmup
    if name == "constant":
        return PEAK
    last = STEPS - 1
    if name == "wsd":
        fall = round(decay_fraction * STEPS)
        return PEAK * (1 - (1 - FINAL) * max(0, step - (last - fall)) / fall)
    done = (step - warmup) / (last - warmup)
    if name == "linear":
        return PEAK * (1 - (1 - FINAL) * done)
    return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)


def config(name: str, warmup: int, decay_fraction: float = 0.25) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=PEAK, schedule=name, warmup_steps=warmup, decay_fraction=decay_fraction, final_fraction=FINAL
    )


@pytest.mark.parametrize("warmup", [0, 1, 2, 7])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "noam", "constant"])
def test_schedule_equals_its_closed_form_at_every_step(name, warmup):
    schedule = make_schedule(config(name, warmup), STEPS)
    found = np.array([float(schedule(step)) for step in range(STEPS)])
    expected = [reference(name, step, warmup, 0.25) for step in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=PEAK * 1e-7)
    assert found.max() == pytest.approx(PEAK, rel=1e-6), "the peak is the configured rate"
    assert found[max(0, warmup - 1)] == pytest.approx(PEAK, rel=1e-6), "the warm-up ends at the peak"
    assert (found > 0).all(), "no step is wasted"
    if name in ("cosine", "linear", "wsd"):
        assert found[-1] == pytest.approx(PEAK * FINAL, rel=2e-6), "the last step has the final rate"


def test_wsd_has_three_phases():
    rates = np.array([float(make_schedule(config("wsd", 7), STEPS)(step)) for step in range(STEPS)])
    fall = round(0.25 * STEPS)
    assert (np.diff(rates[:7]) > 0).all()
    np.testing.assert_allclose(rates[6 : STEPS - fall], PEAK, rtol=1e-6)
    assert (np.diff(rates[STEPS - fall - 1 :]) < 0).all()


def test_noam_is_the_formula_of_the_paper_up_to_its_scale():
    d_model, warmup = 512, 7
    paper = [d_model**-0.5 * min(step**-0.5, step * warmup**-1.5) for step in range(1, STEPS + 1)]  # 1706.03762, eq. 3
    same_peak = replace(config("noam", warmup), learning_rate=d_model**-0.5 * warmup**-0.5)
    rates = [float(make_schedule(same_peak, STEPS)(step)) for step in range(STEPS)]
    np.testing.assert_allclose(rates, paper, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 5, 7, 8, 9])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_schedule_of_a_run_hardly_longer_than_its_warmup_stays_finite_and_below_the_peak(name, steps):
    schedule = make_schedule(config(name, 7, decay_fraction=1.0), steps)
    rates = np.array([float(schedule(step)) for step in range(steps)])
    assert np.isfinite(rates).all() and (rates > 0).all() and (rates <= PEAK * (1 + 1e-6)).all()
    if steps == 9:
        assert rates[-1] == pytest.approx(PEAK * FINAL, rel=2e-6)


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
