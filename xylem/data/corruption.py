"""What the corruptions share: randomness that belongs to a window, spans that do not overlap, the checks of rates."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from xylem.errors import ConfigError


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The randomness of one window in one epoch: a pure function of three numbers.

    What is drawn from it differs from epoch to epoch (RoBERTa's dynamic masking, 1907.11692, section 4.1), and knows
    nothing of hosts, workers or where a run was resumed. Streams never overlap: Philox is a keyed function of a counter
    (Salmon et al. 2011, doi.org/10.1145/2063384.2063405); seed and epoch are its key, and the index is the counter's
    highest word, so that 2**194 numbers lie between one window and the next.

    Args:
        seed, epoch, index: whole numbers from 0 to 2**64 - 1.

    Raises:
        ConfigError: a number out of range.
    """
    for field, value in (("seed", seed), ("epoch", epoch), ("index", index)):
        if not 0 <= value < 2**64:
            raise ConfigError(field, value, "a whole number from 0 to 2**64 - 1")
    key: Any = _Key(seed, epoch)  # numpy's stubs allow a SeedSequence alone
    return np.random.Generator(np.random.Philox(key, counter=np.array([0, 0, 0, index], np.uint64)))


class _Key(np.random.bit_generator.ISeedSequence):
    """Two numbers as they are. ``Philox(key=...)`` says the same but fetches unused entropy first, most of its time."""

    def __init__(self, *numbers: int):
        self.numbers = np.array(numbers, np.uint64)

    def generate_state(self, n_words, dtype=np.uint32):
        """What Philox asks for, once: its key, two words of 64 bits."""
        return self.numbers


def subset(total: int, size: int, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """``size`` of the numbers 0 .. total - 1, in ascending order; all subsets are equally likely."""
    return np.sort(rng.choice(total, size, replace=False, shuffle=False))


def span_lengths(
    total: int, draw: Callable[[int], Int[np.ndarray, " _"]], rng: np.random.Generator
) -> Int[np.ndarray, " _"]:
    """Lengths drawn one after another until they cover ``total``, the last one cut to fit, in random order.

    Args:
        total: the sum of the lengths.
        draw: gives that many independent lengths, zeros among them or not.
        rng: shuffles them, so that the one that was cut has no place of its own.
    """
    lengths = draw(total)
    while lengths.sum() < total:
        lengths = np.concatenate([lengths, draw(total)])
    ends = np.cumsum(lengths)
    ends = np.minimum(ends[: np.searchsorted(ends, total) + 1], total)
    return rng.permutation(np.diff(ends, prepend=0))


def place(lengths: Int[np.ndarray, " N"], total: int, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """Where spans of these lengths start among ``total`` items, without overlap and in this order.

    All arrangements of the spans and the items outside them are equally likely; spans may touch.
    """
    covered = np.cumsum(lengths) - lengths
    places = subset(len(lengths) + total - int(lengths.sum()), len(lengths), rng)
    return places - np.arange(len(lengths)) + covered


def spread(starts: Int[np.ndarray, " N"], lengths: Int[np.ndarray, " N"]) -> Int[np.ndarray, " _"]:
    """start, start + 1, ... start + length - 1 of each span, one span after another."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def share(total: int, rate: float) -> int:
    """ceil(rate * total); a product that is whole but for its rounding is not raised by one (0.07 * 100 > 7)."""
    return math.ceil(rate * total - 1e-9)


def check_fraction(field: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ConfigError(field, value, "a fraction from 0 to 1")


def check_id(field: str, value: int, vocab_size: int) -> None:
    """Raise ConfigError unless ``value`` is an id of the vocabulary."""
    if not 0 <= value < vocab_size:
        raise ConfigError(field, value, f"an id of the vocabulary: 0 to {vocab_size - 1}")
