"""Texts in, labels out: a model that was fine-tuned to judge texts or words, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from xylem.data import labelled, tagged
from xylem.errors import ConfigError
from xylem.models import heads
from xylem.training.inputs import token_types_of
from xylem.training.restore import Model

ROWS = 16  # texts at once


class Judgement(NamedTuple):
    """The likeliest label, and how likely it is."""

    label: str
    probability: float


def judge_texts(model: Model, texts: Sequence[Sequence[str]]) -> list[Judgement]:
    """The label of each text; a text is one string, or the two that are judged together.

    Raises:
        ConfigError: a text is empty.
    """
    _check_text(texts)
    size, types = model.data.sequence_length, token_types_of(model.module.config)
    rows = [labelled.row(model.tokenizer, text, size, types) for text in texts]
    return [_best(model, each) for each in _probabilities(model, rows)]


def judge_words(model: Model, texts: Sequence[Sequence[str]]) -> list[list[Judgement | None]]:
    """The label of each word of each text, given as its words; None for one that lies beyond what the model reads.

    Raises:
        ConfigError: a text has no words.
    """
    _check_text(texts)
    size, types = model.data.sequence_length, token_types_of(model.module.config)
    made = [tagged.row(model.tokenizer, words, size, types) for words in texts]
    found = _probabilities(model, [row for row, _ in made])
    return [
        [None if place < 0 else _best(model, each[place]) for place in places]
        for (_, places), each in zip(made, found, strict=True)
    ]


def _check_text(texts: Sequence[Sequence[str]]) -> None:
    if empty := next((place for place, text in enumerate(texts, 1) if not "".join(text).strip()), None):
        raise ConfigError("text", "", f"each text has some words; number {empty} has none")


def _best(model: Model, probabilities: Float32[np.ndarray, " C"]) -> Judgement:
    place = int(probabilities.argmax())
    return Judgement(model.labels[place], float(probabilities[place]))


def _probabilities(model: Model, rows: Sequence[dict[str, Any]]) -> Iterator[Float32[np.ndarray, "..."]]:
    """What the head gives for each row; the last rows are judged among zeros, so that one program serves all."""
    run = jax.jit(lambda params, batch: jax.nn.softmax(heads.judged(model.module, params, batch)))
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        filled = [*some, *[some[0]] * (ROWS - len(some))]
        batch = {name: np.stack([row[name] for row in filled]) for name in some[0] if name != "weights"}
        yield from np.asarray(run(model.params, batch))[: len(some)]
