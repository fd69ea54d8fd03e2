"""How far counts of random draws are from the probabilities they should have."""

import numpy as np

# Standard errors a count may be off: 2e-9 of all normal draws are further, so that even a hundred counts together
# accuse correct code less than once in a million runs. Where it is used, every expected count is in the hundreds.
BAR = 6.0


def standard_errors(counts, probabilities) -> float:
    """The largest deviation of a multinomial's counts from their expectations, in standard errors.

    Whatever probability is missing to 1 must have gone to no count.
    """
    counts, probabilities = np.asarray(counts, np.float64), np.asarray(probabilities, np.float64)
    total = counts.sum()
    return float(np.max(np.abs(counts - total * probabilities) / np.sqrt(total * probabilities * (1 - probabilities))))


def histogram(values, last: int) -> np.ndarray:
    """How often each of 0, 1, ... last - 1 occurs, and, at the end, whatever is ``last`` or more."""
    return np.bincount(np.minimum(values, last), minlength=last + 1)
