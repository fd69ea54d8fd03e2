"""Conversations to learn from: files of questions and answers -> rows in which the answers alone count.

A line of a JSONL file is one conversation, in any of the forms that are about::

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"instruction": ..., "input": ..., "output": ...}      "input" may be missing
    {"prompt": ..., "completion": ...}

It is written as the checkpoint's chat template says; a tokenizer without one gives the question, a line break and the
answer. What the assistant says is learned, and the token that ends it: by a decoder in packed rows of whole
conversations (``prepare``), by an encoder-decoder one answer a row, its source what stands before (``prepare_pairs``).
``trivia`` names a set that is fetched (``data/trivia.py``); ``finance``, ``medicine`` and ``law`` name others, made or
fetched (``data/domains.py``).
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
from xylem.data.examples import source_and_target
from xylem.data.listed import Listed, all_of, held_out, listed
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


class Pair(NamedTuple):
    """What an encoder-decoder reads, and what it writes."""

    source: Int32[np.ndarray, " S"]
    target: Int32[np.ndarray, " T"]


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


def pairs(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Pair]:
    """Each answer of a conversation with what stands before it, both with a token that ends them.

    A source is what ``generation.Generator`` makes of that text, a question's line break being left out with it.

    Raises:
        ConfigError: as ``encode``.
    """
    template = tokenizer.chat_template is not None
    first = [] if template or tokenizer.begin_of_text is None else [tokenizer.begin_of_text]
    made, before = [], ""
    for text, answer in _pieces(messages, tokenizer):
        if answer:
            read = before if template else before.removesuffix("\n")
            source, target = tokenizer.encode_batch([read, text], parse_special=template)
            end = [] if len(target) and target[-1] in tokenizer.stop else [tokenizer.end_of_text]
            sides = (*first, *source, tokenizer.end_of_text), (*target, *end)
            made.append(Pair(*(np.asarray(side, np.int32) for side in sides)))
        before += text
    return made


def prepare(config: DataConfig, tokenizer: Tokenizer) -> Listed:
    """The conversations of ``config.corpus``, encoded and packed; ``config.validation``, or the last of them, held out
    (``NAMED`` sets have held-out ones of their own).

    Raises:
        ConfigError: a file that cannot be read, a line that is no conversation, or no answer that fits into a row.
    """

    def rows(conversations: Sequence[Sequence[Message]], split: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
        encoded = [encode(messages, tokenizer) for messages in conversations]
        answered = [one for one in encoded if one.answer[1 : config.sequence_length + 1].any()]
        if not answered:
            allowed = f"its {split} split has no answer that begins within {config.sequence_length} tokens"
            raise ConfigError("data.corpus", config.corpus, allowed)
        counts = {
            "documents": len(answered),
            "left_out": len(encoded) - len(answered),
            "tokens": sum(len(one.tokens) for one in answered),
        }
        return pack(answered, config.sequence_length, tokenizer.end_of_text), counts

    return _prepared(config, tokenizer, rows)


def prepare_pairs(config: DataConfig, tokenizer: Tokenizer, start: int) -> Listed:
    """The answers of ``config.corpus`` as rows for an encoder-decoder; held out as ``prepare`` says.

    A row has ``tokens``, ``segments``, ``decoder_tokens``, ``labels`` and ``weights`` (``data/examples.py``), all (T,)
    of ``config.sequence_length``; ``start`` stands in front of what the decoder reads. A source that is too long loses
    its beginning, an answer its end.

    Raises:
        ConfigError: a file that cannot be read, or a line that is no conversation.
    """
    size = config.sequence_length

    def rows(conversations: Sequence[Sequence[Message]], split: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
        made = [one for messages in conversations for one in pairs(messages, tokenizer)]
        counts = {"documents": len(conversations), "tokens": sum(len(source) + len(target) for source, target in made)}
        cut = [source_and_target(source[-size:], target[:size], start, size, size) for source, target in made]
        return cut, counts

    return _prepared(config, tokenizer, rows, "pairs")


def _prepared(config: DataConfig, tokenizer: Tokenizer, make: Any, *kind: str) -> Listed:
    """Each split's conversations as ``make(conversations, split) -> (rows, counts)`` gives them; ``kind`` of rows."""
    splits, hashes = _splits(config)
    rows, counts = {}, {}
    for name, conversations in splits.items():
        rows[name], found = make(conversations, name)
        size = sum(len(m["content"].encode()) for messages in conversations for m in messages)
        counts[name] = {**found, "bytes": size, "windows": len(rows[name])}
    return listed(config, tokenizer, hashes, rows, counts, *kind)


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
