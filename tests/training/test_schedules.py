"""Learning rates against their closed forms, at every step."""

import math
from dataclasses import replace

import numpy as np
import pytest

from xylem.training.config import OptimizerConfig
from xylem.training.schedules import make_schedule

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
