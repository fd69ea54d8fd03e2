"""From a record to a training example: what each objective makes of a window of text.

Each function is ``(record, rng, settings) -> Example`` and gives arrays of one size whatever the record holds, so that
examples stack to batches. A record has ``tokens`` and ``segments`` (T+1,) of a packed window (``pipeline.Prepared``);
those of pairs (``pairs.records``) also ``token_types`` (T,) and ``pair_labels``; those of tasks (``mixture.Mixture``)
are ``tokens`` and ``targets``, of any lengths.

An example has ``tokens``, ``segments`` (S,), ``labels`` and ``weights``; besides, where an objective has them,
``token_types``, ``decoder_tokens``, ``pair_labels``, and ``places``: the positions that are predicted, where they are
few. ``weights`` are 1 at real labels and 0 elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from xylem.data import spans
from xylem.data.denoising import Noise

Record = Mapping[str, Any]
Example = dict[str, Any]  # of arrays
MakeExample = Callable[[Record, np.random.Generator], Example]
# Ids of one text -> (inputs, labels, weights), as ``masking.mask_tokens`` gives them.
Hide = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]]


def next_token(record: Record, rng: np.random.Generator) -> Example:
    """Every token is predicted from those before it: ``labels[t]`` follows ``tokens[t]``."""
    tokens, segments = record["tokens"], record["segments"]
    weights = (segments[1:] > 0).astype(np.float32)
    return {"tokens": tokens[:-1], "labels": tokens[1:], "segments": segments[:-1], "weights": weights}


def next_window(record: Record, rng: np.random.Generator, *, end: int) -> Example:
    """As ``next_token``; and ``opens``: 1 where the window begins with the end-of-text that opens a document, else 0,
    where it goes on with the text of the window before it."""
    return next_token(record, rng) | {"opens": np.int32(record["tokens"][0] == end)}


def hidden_tokens(record: Record, rng: np.random.Generator, *, hide: Hide, most: int) -> Example:
    """What was hidden is predicted, from both sides.

    Args:
        record: of packed text or of pairs.
        rng: of this record in this epoch.
        hide: chooses and replaces tokens; no special or padding token among them.
        most: the largest number that it chooses.

    Returns:
        tokens, segments (T,); places, labels, weights (most,), filled up with weight 0; and what a pair has.
    """
    inputs, labels, weights = hide(record["tokens"][:-1], rng)
    chosen = np.flatnonzero(weights)
    made = {
        "tokens": inputs,
        "segments": record["segments"][:-1],
        "places": _filled(chosen, most),
        "labels": _filled(labels[chosen], most),
        "weights": _filled(np.ones(len(chosen)), most).astype(np.float32),
    }
    return made | {name: np.int32(record[name]) for name in ("token_types", "pair_labels") if name in record}


def corrupted_spans(
    record: Record,
    rng: np.random.Generator,
    *,
    vocab_size: int,
    end: int,
    start: int,
    noise_density: float,
    mean_span: float,
    sentinels: int,
    target_length: int = 0,
) -> Example:
    """Spans are missing from the source, and listed by the target (T5; see ``spans.span_corruption``).

    The target is padded to ``target_length`` where that is more than it needs.
    """
    settings = (noise_density, mean_span)
    inputs, targets = spans.span_corruption(_text(record), rng, vocab_size, end, *settings, sentinels)
    inputs_size, targets_size = spans.sizes(len(record["tokens"]) - 1, *settings)
    return source_and_target(inputs, targets, start, inputs_size, max(targets_size, target_length))


def text_to_text(record: Record, rng: np.random.Generator, *, end: int, start: int, sizes: tuple[int, int]) -> Example:
    """The target of a task's example is written after reading its input (T5, 1910.10683, section 2.3). Both end with
    ``end``; what is longer than its size loses the tokens before that."""
    inputs, targets = (
        np.append(record[name][: size - 1], end) for name, size in zip(("tokens", "targets"), sizes, strict=True)
    )
    return source_and_target(inputs, targets, start, *sizes)


def mixed(record: Record, rng: np.random.Generator, *, window: MakeExample, task: MakeExample) -> Example:
    """What ``window`` makes of a window of text, or ``task`` of a task's example."""
    return task(record, rng) if "targets" in record else window(record, rng)


def denoised(record: Record, rng: np.random.Generator, *, noise: Noise, end: int, start: int) -> Example:
    """A spoilt text is written anew (BART; see ``denoising``). Both begin with the text's first T-1 tokens and end with
    ``end``; a source that the noise has lengthened beyond T loses its last tokens."""
    size = len(record["tokens"]) - 1
    text = _text(record)[: size - 1]
    return source_and_target(np.append(noise(text, rng)[: size - 1], end), np.append(text, end), start, size, size)


def continued(record: Record, rng: np.random.Generator, *, start: int) -> Example:
    """The second half of a window is written after reading the first: prefix language modelling (T5, 1910.10683,
    section 3.2.3), cut in the middle so that no example is padded."""
    size = len(record["tokens"]) - 1
    text, half = _text(record), size // 2
    return source_and_target(text[:half], text[half:], start, half, size - half)


def _text(record: Record) -> Int32[np.ndarray, " _"]:
    """The tokens of a window that are no padding."""
    return record["tokens"][:-1][record["segments"][:-1] > 0]


def source_and_target(
    inputs: np.ndarray, targets: np.ndarray, start: int, inputs_size: int, targets_size: int
) -> Example:
    """A source and its target, which the decoder reads one place later, behind ``start``."""
    labels = _filled(targets, targets_size)
    return {
        "tokens": _filled(inputs, inputs_size),
        "segments": _filled(np.ones(len(inputs)), inputs_size),
        "decoder_tokens": np.append(np.int32(start), labels[:-1]),
        "labels": labels,
        "weights": _filled(np.ones(len(targets)), targets_size).astype(np.float32),
    }


def _filled(values: np.ndarray, size: int) -> Int32[np.ndarray, " size"]:
    """Values as int32, zeros behind them."""
    return np.pad(values.astype(np.int32), (0, size - len(values)))
