"""Losses of the same held-out answers by several models: means, and how sure they and their differences are.

A row has ``nll``, the negative log-likelihood of each answer in nats, and ``tokens``, how many each has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def loss_of(row: Mapping[str, Any]) -> float:
    """Nats a token of all answers together."""
    return math.fsum(row["nll"]) / math.fsum(row["tokens"])


def spread(nll: Sequence[float], tokens: Sequence[float]) -> float:
    """Standard error of ``sum(nll) / sum(tokens)``, the conversations being drawn (of a ratio of two sums: Cochran,
    Sampling Techniques, 3rd edition, equation 2.39)."""
    count, mean = len(nll), math.fsum(nll) / math.fsum(tokens)
    squares = math.fsum((one - mean * size) ** 2 for one, size in zip(nll, tokens, strict=True))
    return math.sqrt(squares * count / (count - 1)) / math.fsum(tokens)


def over(worse: Mapping[str, Any], better: Mapping[str, Any]) -> tuple[float, float]:
    """By how much one loss is above another on the same answers, and the standard error of that."""
    gains = [before - after for before, after in zip(worse["nll"], better["nll"], strict=True)]
    return loss_of(worse) - loss_of(better), spread(gains, better["tokens"])
