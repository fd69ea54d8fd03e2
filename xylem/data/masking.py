"""Masked language modelling: BERT's choice of tokens and what becomes of them, and ALBERT's n-grams.

Drawn anew from ``corruption.generator(seed, epoch, index)``, the same function is RoBERTa's dynamic masking.
"""

from collections.abc import Collection

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from xylem.data import corruption
from xylem.errors import ConfigError


def mask_tokens(
    tokens: Int32[np.ndarray, " T"],
    rng: np.random.Generator,
    special: Collection[int],
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
    *,
    masked: float = 0.8,
    random: float = 0.1,
    max_ngram: int = 1,
    continues: Bool[np.ndarray, " T"] | None = None,
) -> tuple[Int32[np.ndarray, " T"], Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
    """Hide some of a window's ordinary tokens.

    round(rate * n) of the n ordinary tokens are chosen, at least one where there is one. Each chosen token, by itself,
    becomes the mask, a random ordinary id, or stays as it is (BERT, 1810.04805, appendix A.1; its own builder draws the
    random id from the whole vocabulary, special tokens among them).

    With ``max_ngram`` above 1, runs of n neighbouring tokens are chosen together, n drawn with p(n) proportional to 1/n
    (ALBERT, 1909.11942, section 4.1), the last run cut to the number of tokens wanted. As in ALBERT's builder, each
    token of a run still meets its own fate, and special tokens are stepped over: a run may go on behind a [SEP].

    Args:
        tokens: a window, special tokens and padding in their places.
        rng: ``corruption.generator`` of the window.
        special: ids that are never chosen and never put in: [CLS], [SEP], padding. ``mask_id`` always is one.
        mask_id: the id of [MASK].
        vocab_size: ids are below it.
        rate: share of the ordinary tokens that is chosen; 0 chooses none.
        masked, random: shares of the chosen ones that become the mask and a random id; the rest is kept.
        max_ngram: the longest run chosen at once.
        continues: where a token continues the word of the one before it. Words are then chosen whole, and rate and runs
            count words, as in ALBERT's runs of complete words.

    Returns:
        The corrupted window (inputs), the window itself (labels), and 1 at each chosen token, else 0 (weights).

    Raises:
        ConfigError: a rate outside 0 to 1, ids outside the vocabulary, or no ordinary id in it.
    """
    excluded = np.array(sorted({*special, mask_id}))
    _check(excluded, mask_id, vocab_size, rate, masked, random, max_ngram)
    is_ordinary = np.ones(vocab_size, bool)
    is_ordinary[excluded] = False
    places = np.flatnonzero(is_ordinary[tokens])
    if continues is None:
        chosen = places[_choose(len(places), rate, max_ngram, rng)]
    else:
        word_of = np.cumsum(~continues[places] | (np.arange(len(places)) == 0)) - 1
        of_words = np.zeros(word_of[-1] + 1 if len(places) else 0, bool)
        of_words[_choose(len(of_words), rate, max_ngram, rng)] = True
        chosen = places[of_words[word_of]]
    fate = rng.random(len(chosen))
    inputs, weights = tokens.copy(), np.zeros(len(tokens), np.float32)
    inputs[chosen[fate < masked]] = mask_id
    replaced = chosen[(fate >= masked) & (fate < masked + random)]
    inputs[replaced] = _random_ids(len(replaced), excluded, vocab_size, rng)
    weights[chosen] = 1
    return inputs, tokens, weights


def _choose(total: int, rate: float, max_ngram: int, rng: np.random.Generator) -> Int[np.ndarray, " _"]:
    """Which of ``total`` units are chosen, in ascending order."""
    wanted = max(1, round(rate * total)) if rate and total else 0
    if max_ngram == 1:
        return corruption.subset(total, wanted, rng)
    sizes = np.arange(1, max_ngram + 1)
    law = 1 / sizes / np.sum(1 / sizes)
    lengths = corruption.span_lengths(wanted, lambda count: rng.choice(sizes, count, p=law), rng)
    return corruption.spread(corruption.place(lengths, total, rng), lengths)


def _random_ids(
    count: int, excluded: Int[np.ndarray, " _"], vocab_size: int, rng: np.random.Generator
) -> Int[np.ndarray, " _"]:
    """Ids drawn evenly from those not in ``excluded``, which ascends: each id steps over the excluded ones below it."""
    ids = rng.integers(vocab_size - len(excluded), size=count)
    return ids + np.searchsorted(excluded - np.arange(len(excluded)), ids, side="right")


def _check(
    excluded: Int[np.ndarray, " _"],
    mask_id: int,
    vocab_size: int,
    rate: float,
    masked: float,
    random: float,
    max_ngram: int,
) -> None:
    corruption.check_fraction("rate", rate)
    corruption.check_fraction("masked", masked)
    corruption.check_fraction("random", random)
    if masked + random > 1 + 1e-9:
        raise ConfigError("random", random, f"a fraction from 0 to {1 - masked:g}: {masked:g} are masked")
    if max_ngram < 1:
        raise ConfigError("max_ngram", max_ngram, "a whole number, at least 1")
    corruption.check_id("mask_id", mask_id, vocab_size)
    for one in (int(excluded[0]), int(excluded[-1])):
        corruption.check_id("special", one, vocab_size)
    if len(excluded) >= vocab_size:
        raise ConfigError("vocab_size", vocab_size, f"more than the {len(excluded)} special ids: one is ordinary")
