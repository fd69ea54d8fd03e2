"""Labelled texts: JSONL files of ``{"text": ..., "label": ...}`` -> rows of one text each.

Two texts that are judged together are ``{"text": ..., "text_pair": ...}``. Labels are names or numbers; they are
numbered in sorted order. ``trec`` names a set that is fetched (``data/trec.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from xylem.data import corpora, trec
from xylem.data.config import DataConfig
from xylem.data.listed import Listed, all_of, as_it_is, held_out
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError

FORM = 'each line is {"text": ..., "label": ...}, perhaps with a "text_pair"'


def prepare(
    config: DataConfig, tokenizer: Tokenizer, token_types: Literal["present", "absent"]
) -> tuple[Listed, list[str]]:
    """The texts of ``config.corpus`` as rows, and the labels' names; ``config.validation``, or the last, held out.

    A row has ``tokens``, ``segments`` and, where present, ``token_types`` (T,); ``labels`` and ``weights`` (). An
    encoder's tokenizer (one with [CLS] and [SEP]) gives [CLS] text [SEP] pair [SEP], any other its begin-of-text, if it
    has one, the texts, and end-of-text. What is too long loses its end.

    Raises:
        ConfigError: a file that cannot be read, a line of another form, a label of the held-out texts that none of the
            others has, or fewer than two labels.
    """
    found, hashes = _splits(config)
    names = sorted({label for _, _, label in found["train"]})
    if len(names) < 2:
        raise ConfigError("data.corpus", config.corpus, f"at least two labels; there is {', '.join(names)}")
    rows, counts = {}, {}
    for split, texts in found.items():
        strange = sorted({label for _, _, label in texts} - set(names))
        if strange:
            raise ConfigError("data.validation", strange[0], f"the labels are {', '.join(names)}", names)
        made = [_row(tokenizer, one[:2], names.index(one[2]), config.sequence_length) for one in texts]
        if token_types == "absent":
            for row in made:
                del row["token_types"]
        rows[split] = made
        counts[split] = {
            "documents": len(texts),
            "bytes": sum(len((first + second).encode()) for first, second, _ in texts),
            "tokens": sum(int(row["segments"].sum()) for row in rows[split]),
            "windows": len(texts),
        }
    key = hashlib.sha256(json.dumps([hashes, tokenizer.hash, config.sequence_length]).encode()).hexdigest()[:16]
    corpus = corpora.Corpus(Path(config.corpus).stem, key, {})
    return Listed(config, corpus, key, Path(config.corpus), tokenizer, counts, as_it_is, rows=rows), names


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


def _row(tokenizer: Tokenizer, pair: Sequence[str], label: int, length: int) -> dict[str, Any]:
    ids, types = _joined(tokenizer, [text for text in pair if text], length)
    room = length - len(ids)
    return {
        "tokens": np.pad(ids, (0, room)),
        "segments": np.pad(np.ones(len(ids), np.int32), (0, room)),
        "token_types": np.pad(types, (0, room)),
        "labels": np.int32(label),
        "weights": np.float32(1),
    }


def _joined(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[Int32[np.ndarray, " T"], Any]:
    """The ids of a row, and which text each belongs to."""
    opens, closes = tokenizer.token_id("[CLS]"), tokenizer.token_id("[SEP]")
    encoder = opens is not None and closes is not None
    first = opens if encoder else tokenizer.begin_of_text
    last = closes if encoder else tokenizer.end_of_text
    encoded = tokenizer.encode_batch(list(texts))
    over = sum(map(len, encoded)) + len(encoded) + (first is not None) - length
    encoded[-1] = encoded[-1][: max(1, len(encoded[-1]) - max(over, 0))]
    parts = [np.append(ids, np.asarray(last, np.int32)) for ids in encoded]
    if first is not None:
        parts[0] = np.insert(parts[0], 0, first)
    types = np.concatenate([np.full(len(part), index, np.int32) for index, part in enumerate(parts)])
    return np.concatenate(parts)[:length].astype(np.int32), types[:length]
