"""How the loss falls with size and data: ``L(N, D) = E + A / N^alpha + B / D^beta`` (Chinchilla, 2203.15556).

N is a model's parameters, D the tokens it was trained on, L its loss in nats a token; training it costs C = 6 N D
operations (2001.08361, section 2.1). The law is fitted to many small runs and says how to spend a larger budget. NumPy
and SciPy alone: nothing here imports jax.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from xylem.errors import ConfigError

Runs = Float[np.ndarray, " runs"]

DELTA = 1e-3  # of the Huber loss (2203.15556, section 3.3): a larger error of log L counts by its size, not its square
# Where descents start (2203.15556, appendix D.3): a = log A, b = log B, e = log E, and the exponents.
GRID = {
    "a": np.arange(0.0, 26.0, 5.0),
    "b": np.arange(0.0, 26.0, 5.0),
    "e": np.arange(-1.0, 1.1, 0.5),
    "alpha": np.arange(0.0, 2.1, 0.5),
    "beta": np.arange(0.0, 2.1, 0.5),
}
STARTS = 24  # descents: from so many of the grid's 4,500 points, those that fit best as they are
STEEPEST = 3.0  # exponents above this are those of runs that do not determine them


@dataclass(frozen=True)
class Law:
    """The five constants. ``law(N, D)`` is the loss they predict, for numbers or for arrays that broadcast."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, N: Any, D: Any) -> Any:
        return self.E + self.A / N**self.alpha + self.B / D**self.beta


class Optimum(NamedTuple):
    """Size and tokens of the lowest loss that a budget can buy, and that loss."""

    N: float
    D: float
    loss: float


def optimal(law: Law, budget: float) -> Optimum:
    """The minimum of ``law`` where ``6 N D = budget``, in closed form (2203.15556, equation 4).

        N = G (C / 6)^(beta / (alpha + beta)),  D = (C / 6)^(alpha / (alpha + beta)) / G,
        G = (alpha A / (beta B))^(1 / (alpha + beta))

    Raises:
        ConfigError: the budget is no positive number, or the law does not fall with both N and D.
    """
    if not 0.0 < budget < np.inf:
        raise ConfigError("budget", budget, "a positive number of FLOPs")
    if not min(law.alpha, law.beta, law.A, law.B) > 0.0:
        raise ConfigError("budget", budget, f"{law} has no optimum: its loss does not fall with both N and D")
    both, product = law.alpha + law.beta, np.log(budget / 6.0)
    log_g = (np.log(law.alpha / law.beta) + np.log(law.A) - np.log(law.B)) / both
    n = float(np.exp(log_g + law.beta / both * product))
    d = float(np.exp(law.alpha / both * product - log_g))
    return Optimum(n, d, float(law(n, d)))


def fit(N: Runs, D: Runs, loss: Runs, delta: float = DELTA, start: Law | None = None) -> Law:
    """The law of some runs: the least sum of Huber losses of ``log law(N, D) - log loss`` (2203.15556, equation 3).

    The law's logarithm is a log-sum-exp of ``a - alpha log N``, ``b - beta log D`` and ``e``: E, A and B stay positive.
    L-BFGS descends from the best points of ``GRID``, or from ``start`` alone. The sum is minimised and not the mean,
    whose gradients are so small that descents end too early (2404.10102).

    Raises:
        ConfigError: fewer than 6 runs, fewer than 3 different N or D, or a value that is no positive number.
    """
    _check(N, D, loss)
    # Logarithms of N and D are counted from their means: the same law, whose a and alpha then hardly depend on each
    # other, which descents need.
    x, y, target = np.log(N), np.log(D), np.log(loss)
    x_mean, y_mean = x.mean(), y.mean()
    runs = (x - x_mean, y - y_mean, target, delta)
    if start is None:
        points = np.array(list(itertools.product(*GRID.values())))
    else:
        points = np.array([[np.log(start.A), np.log(start.B), np.log(start.E), start.alpha, start.beta]])
    points[:, 0] -= points[:, 3] * x_mean
    points[:, 1] -= points[:, 4] * y_mean
    values, _ = _huber(points.T[..., None], *runs)
    descents = [_descend(point, runs) for point in points[np.argsort(values, kind="stable")[:STARTS]]]
    a, b, e, alpha, beta = min(descents, key=lambda descent: descent.fun).x
    a, b = a + alpha * x_mean, b + beta * y_mean
    return Law(*map(float, (np.exp(e), np.exp(a), np.exp(b), alpha, beta)))


def bootstrap(N: Runs, D: Runs, loss: Runs, law: Law, samples: int, seed: int) -> list[Law]:
    """Laws of ``samples`` draws of as many runs, with replacement: their spread tells how sure ``law``, the fit, is.

    Each descends from ``law``. A draw that has too few different N or D for a fit is drawn anew.
    """
    rng, laws = np.random.default_rng(seed), []
    while len(laws) < samples:
        rows = rng.integers(0, N.size, N.size)
        if _enough(N[rows]) and _enough(D[rows]):
            laws.append(fit(N[rows], D[rows], loss[rows], start=law))
    return laws


def interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """The middle ``level`` of some values, as their quantiles; numbers that are not finite count at the ends."""
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


class Parabola(NamedTuple):
    """``loss = bottom + curvature (log N - log N_best)^2``, with the least loss at ``N``."""

    N: float
    bottom: float
    curvature: float

    def __call__(self, N: Any) -> Any:
        return self.bottom + self.curvature * np.log(N / self.N) ** 2


def parabola(N: Runs, loss: Runs) -> Parabola | None:
    """The parabola through the runs of one budget, by least squares (2203.15556, section 3.2).

    None where no minimum lies between the smallest and the largest of at least three sizes.
    """
    if not _enough(N):
        return None
    x = np.log(N)
    middle = x.mean()
    square, slope, constant = np.polyfit(x - middle, loss, 2)
    if square <= 0:
        return None
    best = -slope / (2 * square)
    if not x.min() < middle + best < x.max():
        return None
    return Parabola(float(np.exp(middle + best)), float(constant - square * best**2), float(square))


def _enough(values: Runs) -> bool:
    return np.unique(values).size >= 3


def _check(N: Runs, D: Runs, loss: Runs) -> None:
    if N.size < 6:
        raise ConfigError("runs", N.size, "five constants need at least 6 runs")
    for name, values in {"N": N, "D": D, "loss": loss}.items():
        wrong = values[~((values > 0) & np.isfinite(values))]
        if wrong.size:
            raise ConfigError(name, float(wrong[0]), "a positive number")
    for name, values in {"N": N, "D": D}.items():
        if not _enough(values):
            raise ConfigError(name, sorted(set(values.tolist())), "a curve needs at least 3 different values")


def _descend(point: np.ndarray, runs: tuple) -> Any:
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20}
    bounds = [(None, None)] * 3 + [(0.0, STEEPEST)] * 2
    return minimize(_huber, point, runs, jac=True, method="L-BFGS-B", bounds=bounds, options=options)


def _huber(point: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray, delta: float) -> tuple[Any, np.ndarray]:
    """The sum of Huber losses of ``log L``, and its gradient; ``point`` is (a, b, e, alpha, beta), or five columns."""
    a, b, e, alpha, beta = point
    terms = np.stack([a - alpha * x, b - beta * y, e + 0.0 * x])
    largest = terms.max(0)
    shares = np.exp(terms - largest)
    total = shares.sum(0)
    error = largest + np.log(total) - target
    slope = np.clip(error, -delta, delta)
    shares *= slope / total
    gradient = [*shares.sum(-1), -(shares[0] * x).sum(-1), -(shares[1] * y).sum(-1)]
    return (slope * (error - 0.5 * slope)).sum(-1), np.array(gradient)
