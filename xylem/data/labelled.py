"""Labelled texts: JSONL files of ``{"text": ..., "label": ...}`` -> rows of one text each.

Two texts that are judged together are ``{"text": ..., "text_pair": ...}``. Labels are names or numbers; they are
numbered in sorted order. ``trec`` names a set that is fetched (``data/trec.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from xylem.data import corpora, trec
from xylem.data.config import DataConfig
from xylem.data.listed import Listed, all_of, held_out, listed
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError

TokenTypes = Literal["present", "absent"]
FORM = 'each line is {"text": ..., "label": ...}, perhaps with a "text_pair"'


def prepare(
    config: DataConfig, tokenizer: Tokenizer, token_types: TokenTypes, known: Sequence[str] = ()
) -> tuple[Listed, list[str]]:
    """The texts of ``config.corpus`` as rows, and the labels' names; ``config.validation``, or the last, held out.

    Rows are those of ``row``. ``known`` are the labels' names where a model has them already.

    Raises:
        ConfigError: a file that cannot be read, a line of another form, a label of the held-out texts that none of the
            others has, one that is not ``known``, or fewer than two labels.
    """
    found, hashes = _splits(config)
    names = named({split: {label for _, _, label in texts} for split, texts in found.items()}, config, known)
    rows, counts = {}, {}
    for split, texts in found.items():
        made = [row(tokenizer, one[:2], config.sequence_length, token_types) for one in texts]
        rows[split] = [each | {"labels": np.int32(names.index(one[2]))} for each, one in zip(made, texts, strict=True)]
        counts[split] = {
            "documents": len(texts),
            "bytes": sum(len((first + second).encode()) for first, second, _ in texts),
            "tokens": sum(int(each["segments"].sum()) for each in made),
            "windows": len(texts),
        }
    return listed(config, tokenizer, hashes, rows, counts), names


def named(labels: Mapping[str, set[str]], config: DataConfig, known: Sequence[str]) -> list[str]:
    """The names of the labels found in each split, in order: those ``known``, or those of the train split, sorted.

    Raises:
        ConfigError: a label is no such name, or there are fewer than two.
    """
    names = list(known) or sorted(labels["train"])
    if len(names) < 2:
        raise ConfigError("data.corpus", config.corpus, f"at least two labels; there is {', '.join(names)}")
    for split, found in labels.items():
        if strange := sorted(found - set(names)):
            setting = "data.corpus" if split == "train" else "data.validation"
            raise ConfigError(setting, strange[0], f"the labels are {', '.join(names)}", names)
    return names


def _splits(config: DataConfig) -> tuple[dict[str, list[tuple[str, str, str]]], list[str]]:
    """The texts by split, and what changes when they do."""
    if config.corpus != trec.TREC:
        return held_out(config, _read, [trec.TREC])
    splits, hashes = trec.load(config.cache_dir), [trec.SHA256]
    if config.validation is not None:
        splits["validation"], more = all_of("data.validation", config.validation, _read)
        hashes += more
    return splits, hashes


def _read(path: Path, setting: str) -> list[tuple[str, str, str]]:
    made = []
    for where, record in corpora.json_lines(path, setting):
        text, pair, label = record.get("text"), record.get("text_pair", ""), record.get("label")
        fits = isinstance(text, str) and isinstance(pair, str) and isinstance(label, str | int)
        if not fits or not str(text).strip():
            raise ConfigError(setting, where, FORM)
        made.append((str(text), pair, str(label)))
    return made


def row(tokenizer: Tokenizer, pair: Sequence[str], length: int, token_types: TokenTypes) -> dict[str, Any]:
    """A text, or two, as ``tokens``, ``segments`` and, where present, ``token_types`` (T,), and its weight of 1.

    An encoder's tokenizer (one with [CLS] and [SEP]) gives [CLS] text [SEP] pair [SEP], any other its begin-of-text, if
    it has one, the texts, and end-of-text. What is too long loses its end.
    """
    ids, types = _joined(tokenizer, [text for text in pair if text], length)
    room = length - len(ids)
    made = {
        "tokens": np.pad(ids, (0, room)),
        "segments": np.pad(np.ones(len(ids), np.int32), (0, room)),
        "token_types": np.pad(types, (0, room)),
        "weights": np.float32(1),
    }
    return made if token_types == "present" else {name: x for name, x in made.items() if name != "token_types"}


def edges(tokenizer: Tokenizer) -> tuple[int | None, int]:
    """The tokens before (None where there is none) and behind a text that is judged."""
    opens, closes = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
    if opens is not None and closes is not None:
        return opens, closes
    return tokenizer.begin_of_text, tokenizer.end_of_text


def _joined(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[Int32[np.ndarray, " T"], Any]:
    """The ids of a row, and which text each belongs to."""
    first, last = edges(tokenizer)
    encoded = tokenizer.encode_batch(list(texts))
    over = sum(map(len, encoded)) + len(encoded) + (first is not None) - length
    encoded[-1] = encoded[-1][: max(1, len(encoded[-1]) - max(over, 0))]
    parts = [np.append(ids, np.asarray(last, np.int32)) for ids in encoded]
    if first is not None:
        parts[0] = np.insert(parts[0], 0, first)
    types = np.concatenate([np.full(len(part), index, np.int32) for index, part in enumerate(parts)])
    return np.concatenate(parts)[:length].astype(np.int32), types[:length]
