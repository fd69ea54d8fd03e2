"""Words with a label each: JSONL files of ``{"words": [...], "labels": [...]}`` -> rows of one text each.

Labels are names or numbers; they are numbered in sorted order. A word of several pieces has its label at the first; the
others are judged too but count for nothing (BERT 1810.04805, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from xylem.data import corpora
from xylem.data.config import DataConfig
from xylem.data.labelled import TokenTypes, edges, named
from xylem.data.listed import Listed, held_out, listed
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError

FORM = 'each line is {"words": [...], "labels": [...]}, a label for each word'


def prepare(
    config: DataConfig, tokenizer: Tokenizer, token_types: TokenTypes, known: Sequence[str] = ()
) -> tuple[Listed, list[str]]:
    """The texts of ``config.corpus`` as rows, and the labels' names, as ``labelled.prepare``.

    A row is that of ``row`` with ``labels`` (int32) and ``weights`` (float32), (T,): 1 at the first piece of a word.

    Raises:
        ConfigError: as ``labelled.prepare``.
    """
    found, hashes = held_out(config, _read)
    names = named({split: {one for _, own in texts for one in own} for split, texts in found.items()}, config, known)
    rows: dict[str, list[dict[str, Any]]] = {}
    counts = {}
    for split, texts in found.items():
        rows[split] = []
        for words, labels in texts:
            made, places = row(tokenizer, words, config.sequence_length, token_types)
            ids = np.array([names.index(label) for label in labels], np.int32)
            kept = places >= 0
            target, weights = np.zeros(config.sequence_length, np.int32), np.zeros(config.sequence_length, np.float32)
            target[places[kept]], weights[places[kept]] = ids[kept], 1.0
            rows[split].append(made | {"labels": target, "weights": weights})
        counts[split] = {
            "documents": len(texts),
            "bytes": sum(len(" ".join(words).encode()) for words, _ in texts),
            "tokens": sum(int(each["segments"].sum()) for each in rows[split]),
            "windows": len(texts),
        }
    return listed(config, tokenizer, hashes, rows, counts, "words"), names


def row(
    tokenizer: Tokenizer, words: Sequence[str], length: int, token_types: TokenTypes
) -> tuple[dict[str, Any], Int32[np.ndarray, " words"]]:
    """A text as ``tokens``, ``segments`` and, where present, ``token_types`` (T,), between the tokens of ``edges``; and
    where each word's first piece stands, -1 for a word that has none: nothing of it can be spelt, or its piece lies
    beyond ``length``.

    Every word but the first is encoded with a space in front, as it stands in running text.
    """
    first, last = edges(tokenizer)
    front = [] if first is None else [first]
    pieces = tokenizer.encode_batch([word if not place else f" {word}" for place, word in enumerate(words)])
    sizes = np.array([len(each) for each in pieces], np.int32)
    places = len(front) + np.cumsum(sizes, dtype=np.int32) - sizes
    room = length - len(front) - 1
    text = np.concatenate(pieces)[: max(room, 0)]
    ids = np.concatenate([front, text, [last]]).astype(np.int32)[:length]
    behind = length - len(ids)
    made = {"tokens": np.pad(ids, (0, behind)), "segments": np.pad(np.ones(len(ids), np.int32), (0, behind))}
    if token_types == "present":
        made["token_types"] = np.zeros(length, np.int32)
    return made, np.where((sizes > 0) & (places < len(front) + len(text)), places, np.int32(-1))


def _read(path: Path, setting: str) -> list[tuple[list[str], list[str]]]:
    made = []
    for where, record in corpora.json_lines(path, setting):
        words, labels = record.get("words"), record.get("labels")
        fits = isinstance(words, list) and isinstance(labels, list) and 0 < len(words) == len(labels)
        fits = fits and all(isinstance(word, str) and word.strip() for word in words or ())
        if not fits or not all(isinstance(label, str | int) for label in labels or ()):
            raise ConfigError(setting, where, FORM)
        made.append((list(words or ()), [str(label) for label in labels or ()]))
    return made
