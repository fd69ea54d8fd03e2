"""Pairs of segments: BERT's next-sentence prediction and ALBERT's sentence order, and the sentences both need.

A document is a list of sentences, a sentence an array of ids: ``[tokenizer.encode(one) for one in sentences(text)]``.
Randomness is Python's ``random.Random``, as in BERT's own builder (``create_pretraining_data.py`` of
github.com/google-research/bert): from equal documents and an equal generator come its instances, token for token, but
for its masks, which ``masking`` draws anew each epoch instead.
"""

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from xylem.data import corruption
from xylem.errors import ConfigError

Sentence = Int32[np.ndarray, " _"]
Document = Sequence[Sentence]

# What precedes a break: a character before a newline; or a full stop, question or exclamation mark and what closes
# behind it, before a blank and, past what opens, the first letter (group 1) of what may be a sentence.
_BREAK = re.compile(
    r"""\S(?=[^\S\n]*\n\s*\S)|[.?!]["'\u201d\u2019)\]]*(?=[^\S\n](?:[^\S\n]|["'\u201c\u2018(\[])*(\w))"""
)


class Pair(NamedTuple):
    """Two segments in one row.

    Attributes:
        tokens: [CLS] A [SEP] B [SEP].
        token_types: 0 up to the first [SEP], 1 after it.
        label: 0 where B continues A; 1 where it does not: B is random (BERT), or A and B are swapped (ALBERT).
    """

    tokens: Int32[np.ndarray, " T"]
    token_types: Int32[np.ndarray, " T"]
    label: int


def sentences(text: str) -> list[str]:
    """A text cut after each line, and after ``.``, ``?`` or ``!`` where blanks and a capital letter follow.

    It knows no abbreviations: "Mr. Smith" is cut. Nothing is lost: the sentences, each with the blanks before it, join
    to the text, except that a blank text has none.
    """
    if not text.strip():
        return []
    found = (match.end() for match in _BREAK.finditer(text) if match[1] is None or match[1].isupper())
    breaks = [0, *found, len(text)]
    return [text[start:end] for start, end in pairwise(breaks)]


def chance(seed: int, epoch: int, index: int) -> random.Random:
    """The randomness of one document in one epoch; see ``corruption.generator``."""
    return random.Random(corruption.generator(seed, epoch, index).bytes(32))


def next_sentence_pairs(
    documents: Sequence[Document],
    index: int,
    rng: random.Random,
    length: int,
    cls: int,
    sep: int,
    short_probability: float = 0.1,
) -> list[Pair]:
    """The next-sentence instances of one document (BERT, 1810.04805, section 3.1, task 2, and appendix A.2).

    Sentences are gathered until they fill a row and cut in two at random. With probability 1/2, and always where there
    is but one sentence, B comes from a random place of another document, and the sentences it displaced begin the next
    row. Should ten draws all give the document itself, B is taken from it, as in BERT's builder.

    Args:
        documents: all documents; none is empty, and no sentence is.
        index: the document whose pairs are made.
        rng: a generator of its own, such as ``chance(seed, epoch, index)``, or one that goes through all documents.
        length: the longest row, its three special tokens included. What is longer loses tokens of its longer segment,
            one at a time, from the front or the back at random.
        cls, sep: the ids of [CLS] and [SEP].
        short_probability: how often a document's rows aim at a random length of 2 to ``length`` - 3 instead.

    Raises:
        ConfigError: an empty document or sentence, fewer than two documents, or rows too short for a pair.
    """
    if len(documents) < 2:
        raise ConfigError("documents", len(documents), "at least 2 documents: a random segment comes from another")
    document = documents[index]
    _check(document, length, short_probability)
    target = _target(length, short_probability, rng)
    pairs, start = [], 0
    while start < len(document):
        end = _filled(document, start, target)
        middle = start + (rng.randint(1, end - start - 1) if end - start > 1 else 1)
        first = np.concatenate(document[start:middle])
        if end - start == 1 or rng.random() < 0.5:
            second, label, start = _random_segment(documents, index, target - len(first), rng), 1, middle
        else:
            second, label, start = np.concatenate(document[middle:end]), 0, end
        pairs.append(_pair(first, second, label, length, cls, sep, rng))
    return pairs


def next_sentence_corpus(
    documents: Sequence[Document],
    rng: random.Random,
    length: int,
    cls: int,
    sep: int,
    short_probability: float = 0.1,
    passes: int = 1,
) -> list[Pair]:
    """The next-sentence instances of a whole corpus in random order, as BERT's builder makes its files.

    Args:
        documents: shuffled first, in a copy.
        rng: one generator for all: ``random.Random(12345)`` is what BERT's builder begins with.
        length, cls, sep, short_probability: as in ``next_sentence_pairs``.
        passes: how often each document is used, other pairs each time (BERT's ``dupe_factor``).

    Raises:
        ConfigError: as ``next_sentence_pairs``.
    """
    shuffled = list(documents)
    rng.shuffle(shuffled)
    settings = (rng, length, cls, sep, short_probability)
    indices = [index for _ in range(passes) for index in range(len(shuffled))]
    pairs = [pair for index in indices for pair in next_sentence_pairs(shuffled, index, *settings)]
    rng.shuffle(pairs)
    return pairs


def sentence_order_pairs(
    document: Document, rng: random.Random, length: int, cls: int, sep: int, short_probability: float = 0.1
) -> list[Pair]:
    """The sentence-order instances of one document (ALBERT, 1909.11942, section 3.1).

    As ``next_sentence_pairs``, but A and B are always consecutive segments, swapped with probability 1/2. A row has two
    sentences at least, and a last sentence that is left alone is not used (ALBERT's builder gives it a random B).

    Args:
        document: its sentences.
        rng, length, cls, sep, short_probability: as in ``next_sentence_pairs``.

    Raises:
        ConfigError: an empty document or sentence, or rows too short for a pair.
    """
    _check(document, length, short_probability)
    target = _target(length, short_probability, rng)
    pairs, start = [], 0
    while start + 1 < len(document):
        end = max(_filled(document, start, target), start + 2)
        middle = start + rng.randint(1, end - start - 1)
        segments = [np.concatenate(document[start:middle]), np.concatenate(document[middle:end])]
        label = int(rng.random() < 0.5)
        first, second = reversed(segments) if label else segments
        pairs.append(_pair(first, second, label, length, cls, sep, rng))
        start = end
    return pairs


def records(pairs: Sequence[Pair], length: int, sep: int) -> list[dict[str, Any]]:
    """Pairs as records of ``length`` + 1 tokens for ``examples.hidden_tokens``, filled up with [SEP]s of segment 0."""

    def record(pair: Pair) -> dict[str, Any]:
        behind = length - len(pair.tokens)
        return {
            "tokens": np.pad(pair.tokens, (0, behind + 1), constant_values=sep),
            "segments": np.pad(np.ones(len(pair.tokens), np.int32), (0, behind + 1)),
            "token_types": np.pad(pair.token_types, (0, behind)),
            "pair_labels": pair.label,
        }

    return [record(pair) for pair in pairs]


def _target(length: int, short_probability: float, rng: random.Random) -> int:
    """The number of ordinary tokens that a document's rows aim at."""
    return rng.randint(2, length - 3) if rng.random() < short_probability else length - 3


def _filled(document: Document, start: int, target: int) -> int:
    """Where the sentences from ``start`` on have come to ``target`` tokens, or the document to its end."""
    size, end = 0, start
    while end < len(document) and (size < target or end == start):
        size += len(document[end])
        end += 1
    return end


def _random_segment(documents: Sequence[Document], index: int, target: int, rng: random.Random) -> Sentence:
    """Sentences of another document from a random one on, until they come to ``target`` tokens."""
    for _ in range(10):
        other = rng.randint(0, len(documents) - 1)
        if other != index:
            break
    document = documents[other]
    if not len(document):
        raise ConfigError("documents", f"document {other}", "each has at least one sentence")
    start = rng.randint(0, len(document) - 1)
    return np.concatenate(document[start : _filled(document, start, target)])


def _pair(first: Sentence, second: Sentence, label: int, length: int, cls: int, sep: int, rng: random.Random) -> Pair:
    """One row, after the longer segment (B where they are equal) has lost what is too much."""
    bounds = [[0, len(first)], [0, len(second)]]
    sizes = [len(first), len(second)]
    for _ in range(sum(sizes) - (length - 3)):
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        if rng.random() < 0.5:
            bounds[longer][0] += 1
        else:
            bounds[longer][1] -= 1
    (start, end), (second_start, second_end) = bounds
    tokens = np.concatenate([[cls], first[start:end], [sep], second[second_start:second_end], [sep]], dtype=np.int32)
    return Pair(tokens, (np.arange(len(tokens)) > sizes[0] + 1).astype(np.int32), label)


def _check(document: Document, length: int, short_probability: float) -> None:
    corruption.check_fraction("short_probability", short_probability)
    if length < 5:
        raise ConfigError("length", length, "at least 5: three special tokens and one of each segment")
    if not len(document) or not all(len(sentence) for sentence in document):
        sizes = [len(sentence) for sentence in document]
        raise ConfigError("documents", sizes, "a document has at least one sentence, and each has a token (sizes)")
