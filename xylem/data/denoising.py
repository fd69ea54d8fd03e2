"""BART's five ways to spoil a document (1910.13461, section 2.2), each ``(tokens, rng, ...) -> tokens``.

A document is its ordinary ids: put the tokens that begin and end it around what comes out. The labels are the document
itself. Bind the settings of each function and chain them with ``compose``:

    compose(partial(token_deletion, rate=0.1), document_rotation)(tokens, corruption.generator(seed, epoch, index))
"""

from collections.abc import Callable, Collection
from functools import partial

import numpy as np
from jaxtyping import Int32

from xylem.data import corruption
from xylem.errors import ConfigError

Noise = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def token_masking(
    tokens: Int32[np.ndarray, " T"], rng: np.random.Generator, mask_id: int, rate: float = 0.15
) -> Int32[np.ndarray, " T"]:
    """ceil(rate * T) random tokens become the mask."""
    corruption.check_fraction("rate", rate)
    masked = tokens.copy()
    masked[corruption.subset(len(tokens), corruption.share(len(tokens), rate), rng)] = mask_id
    return masked


def token_deletion(
    tokens: Int32[np.ndarray, " T"], rng: np.random.Generator, rate: float = 0.15
) -> Int32[np.ndarray, " _"]:
    """ceil(rate * T) random tokens are gone without a trace: the model must find out where."""
    corruption.check_fraction("rate", rate)
    return np.delete(tokens, corruption.subset(len(tokens), corruption.share(len(tokens), rate), rng))


def text_infilling(
    tokens: Int32[np.ndarray, " T"],
    rng: np.random.Generator,
    mask_id: int,
    rate: float = 0.3,
    mean_span: float = 3.0,
) -> Int32[np.ndarray, " _"]:
    """Spans become one mask each, whatever their length; a span of length 0 puts a mask between two tokens.

    Args:
        tokens: the document.
        rng: ``corruption.generator`` of the document.
        mask_id: the id of <mask>.
        rate: ceil(rate * T) tokens are taken out (section 5.1: 30%).
        mean_span: lengths are Poisson with this mean, the last one cut to that number. All arrangements of the spans
            are equally likely; they never overlap, so that no length is lost.

    Raises:
        ConfigError: a rate outside 0 to 1, or a mean that is not positive.
    """
    corruption.check_fraction("rate", rate)
    if not mean_span > 0:
        raise ConfigError("mean_span", mean_span, "a positive number of tokens")
    taken = corruption.share(len(tokens), rate)
    lengths = corruption.span_lengths(taken, lambda count: rng.poisson(mean_span, count), rng)
    starts = corruption.place(lengths, len(tokens), rng)
    kept = np.delete(tokens, corruption.spread(starts, lengths))
    return np.insert(kept, starts - (np.cumsum(lengths) - lengths), mask_id)


def sentence_permutation(
    tokens: Int32[np.ndarray, " T"], rng: np.random.Generator, stops: Collection[int]
) -> Int32[np.ndarray, " T"]:
    """All sentences in random order.

    Args:
        tokens: the document.
        rng: ``corruption.generator`` of the document.
        stops: ids that end a sentence, such as those of ``.``; of several in a row, the last does. What follows the
            last stop is a sentence too.
    """
    if not len(tokens):
        return tokens
    is_stop = np.isin(tokens, list(stops))
    ends = np.append(np.flatnonzero(is_stop[:-1] & ~is_stop[1:]) + 1, len(tokens))
    lengths = np.diff(ends, prepend=0)
    order = rng.permutation(len(ends))
    return tokens[corruption.spread((ends - lengths)[order], lengths[order])]


def document_rotation(tokens: Int32[np.ndarray, " T"], rng: np.random.Generator) -> Int32[np.ndarray, " T"]:
    """The document begins with one of its tokens, chosen evenly, and what was before that comes last."""
    return np.roll(tokens, -int(rng.integers(len(tokens)))) if len(tokens) else tokens


def compose(*functions: Noise) -> Noise:
    """One corruption of several, applied from left to right with one generator."""

    def composed(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for function in functions:
            tokens = function(tokens, rng)
        return tokens

    return composed


def bart(mask_id: int, stops: Collection[int], rate: float = 0.3, mean_span: float = 3.0) -> Noise:
    """What BART itself was trained with (section 5.1): all sentences permuted, then 30% of the tokens infilled."""
    infilling = partial(text_infilling, mask_id=mask_id, rate=rate, mean_span=mean_span)
    return compose(partial(sentence_permutation, stops=stops), infilling)
