"""Conversations to learn from: files of questions and answers -> packed rows in which the answers alone count.

A line of a JSONL file is one conversation, in any of the forms that are about::

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"instruction": ..., "input": ..., "output": ...}      "input" may be missing
    {"prompt": ..., "completion": ...}

It is written as the checkpoint's chat template says; a tokenizer without one gives the question, a line break and the
answer. What the assistant says is learned, and the token that ends it. ``trivia`` names a set that is fetched
(``data/trivia.py``), ``finance``, ``medicine`` and ``law`` others that are made or fetched (``data/domains.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from xylem.data import corpora, domains, trivia
from xylem.data.config import DataConfig
from xylem.data.listed import Listed, all_of, as_it_is, held_out
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError

Message = Mapping[str, str]
FORMS = 'each line has "messages", or "instruction" and "output", or "prompt" and "completion"'


# Sets by name: what reads their conversations, split by split, given the cache's folder.
NAMED: dict[str, Callable[[str | None], dict[str, list[Any]]]] = {
    trivia.TRIVIA: trivia.load,
    **{name: partial(domains.load, name) for name in domains.DOMAINS},
}


class Example(NamedTuple):
    """A conversation as ids, and which of them the assistant said."""

    tokens: Int32[np.ndarray, " T"]
    answer: Bool[np.ndarray, " T"]


def messages_of(record: Mapping[str, Any], where: str) -> list[Message]:
    """The messages of a line.

    Raises:
        ConfigError: it has none of the forms, or nobody answers; ``where`` names it.
    """
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    if isinstance(record.get("messages"), list):
        made: list[Any] = record["messages"]
    elif "instruction" in record:
        asked = "\n\n".join(str(text) for name in ("instruction", "input") if (text := record.get(name)))
        made = [turn("user", asked), turn("assistant", record.get("output"))]
    elif "prompt" in record:
        made = [turn("user", record["prompt"]), turn("assistant", record.get("completion"))]
    else:
        raise ConfigError("data.corpus", where, FORMS)
    for one in made:
        told = isinstance(one, Mapping) and all(isinstance(one.get(name), str) for name in ("role", "content"))
        if not told or not one["content"].strip():
            raise ConfigError("data.corpus", where, f"its messages have a role and a content that is no space; {FORMS}")
    if not any(one["role"] == "assistant" for one in made):
        raise ConfigError("data.corpus", where, "somebody must answer: no message is the assistant's")
    return made


def encode(messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """A conversation as ids; answers run from behind the opening of the assistant's turn to its end token, included.

    Raises:
        ConfigError: the chat template refuses the messages, or rewrites earlier turns when later ones are added.
    """
    pieces = list(_pieces(messages, tokenizer))
    ids = [tokenizer.encode(text, parse_special=tokenizer.chat_template is not None) for text, _ in pieces]
    said = [np.full(len(part), answer) for part, (_, answer) in zip(ids, pieces, strict=True)]
    if tokenizer.chat_template is None:
        ids.append(np.array([tokenizer.end_of_text], np.int32))
        said.append(np.array([True]))
    return Example(np.concatenate(ids), np.concatenate(said))


def _pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text in order, cut where the assistant begins and ends; whether a piece is an answer."""
    if tokenizer.chat_template is None:
        for one in messages:
            answer = one["role"] == "assistant"
            yield one["content"] if answer else f"{one['content']}\n", answer
        return
    done = ""
    for index, one in enumerate(messages):
        if one["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            allowed = "its chat template writes earlier turns otherwise when later ones follow; give one turn a line"
            raise ConfigError("data.tokenizer", tokenizer.name, allowed)
        said = after[len(before) :]
        end = len(said.rstrip())  # what a template puts behind the end token belongs to the next turn
        yield before[len(done) :], False
        yield said[:end], True
        done = before + said[:end]


def pack(examples: Sequence[Example], length: int, pad: int) -> list[dict[str, np.ndarray]]:
    """Rows of ``length`` tokens: conversations, the longest first, each whole in the first row that has room for it.

    What is longer than a row keeps its beginning. A row has ``tokens``, ``labels``, ``segments`` (int32) and
    ``weights`` (float32), all (T,): labels[t] follows tokens[t]; weights are 1 where that is part of an answer;
    conversations of a row are numbered from 1, and 0 is padding.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for one in sorted(examples, key=lambda one: -len(one.tokens)):
        size = min(len(one.tokens) - 1, length)  # the last token is only a label
        place = next((row for row, left in enumerate(room) if left >= size), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(length)
        rows[place].append(Example(one.tokens[: size + 1], one.answer[: size + 1]))
        room[place] -= size
    return [_row(row, length, pad) for row in rows]


def _row(examples: Sequence[Example], length: int, pad: int) -> dict[str, np.ndarray]:
    tokens, labels = np.full((2, length), pad, np.int32)
    segments, weights, start = np.zeros(length, np.int32), np.zeros(length, np.float32), 0
    for number, one in enumerate(examples, start=1):
        stop = start + len(one.tokens) - 1
        tokens[start:stop], labels[start:stop] = one.tokens[:-1], one.tokens[1:]
        segments[start:stop], weights[start:stop] = number, one.answer[1:]
        start = stop
    return {"tokens": tokens, "labels": labels, "segments": segments, "weights": weights}


def prepare(config: DataConfig, tokenizer: Tokenizer) -> Listed:
    """The conversations of ``config.corpus``, encoded and packed; ``config.validation``, or the last of them, held out
    (``NAMED`` sets have held-out ones of their own).

    Raises:
        ConfigError: a file that cannot be read, a line that is no conversation, or no answer that fits into a row.
    """
    splits, hashes = _splits(config)
    rows, counts = {}, {}
    for name, conversations in splits.items():
        encoded = [encode(messages, tokenizer) for messages in conversations]
        answered = [one for one in encoded if one.answer[1 : config.sequence_length + 1].any()]
        if not answered:
            allowed = f"its {name} split has no answer that begins within {config.sequence_length} tokens"
            raise ConfigError("data.corpus", config.corpus, allowed)
        rows[name] = pack(answered, config.sequence_length, tokenizer.end_of_text)
        counts[name] = {
            "documents": len(answered),
            "left_out": len(encoded) - len(answered),
            "bytes": sum(len(m["content"].encode()) for messages in conversations for m in messages),
            "tokens": sum(len(one.tokens) for one in answered),
            "windows": len(rows[name]),
        }
    key = hashlib.sha256(json.dumps([hashes, tokenizer.hash, config.sequence_length]).encode()).hexdigest()[:16]
    name = Path(config.corpus).stem
    corpus = corpora.Corpus(name, key, {})
    return Listed(config, corpus, key, Path(config.corpus), tokenizer, counts, as_it_is, rows=rows)


def _splits(config: DataConfig) -> tuple[dict[str, list[Any]], list[str]]:
    """The conversations by split, and what changes when they do."""
    if config.corpus not in NAMED:
        return held_out(config, _read, list(NAMED))
    splits = NAMED[config.corpus](config.cache_dir)
    hashes = [hashlib.sha256(json.dumps(splits).encode()).hexdigest()]
    if config.validation is not None:
        splits["validation"], more = all_of("data.validation", config.validation, _read)
        hashes += more
    return splits, hashes


def _read(path: Path, setting: str) -> list[list[Message]]:
    return [messages_of(record, where) for where, record in corpora.json_lines(path, setting)]
