"""Conversations of three domains, by name: finance, medicine, law. Each has held-out ones of its own.

``finance``: is a headline good news for the shareholders? Made by the rules of ``data/headlines.py``.
``medicine``: 300 questions of Indian medical entrance exams, each with four answers (MedMCQA 2203.14371).
``law``: 340 questions about tort law in the United States, each with four answers.

The questions of the latter two ship in the package ``evals``, whose licence they have. Each fifth of the medical
questions is held out, and each tenth of the longer legal ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xylem import files
from xylem.data import headlines, packages

LICENCE = "MIT (the licence of the package evals, which excepts neither set)"
PACKAGE = ("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
MEMBERS = {
    "medicine": (
        "evals/registry/data/medmcqa/samples.jsonl",
        "833cc45e0d32881afb2f6a6aa00524c77071833acf9bc8729ae1423ea0beb260",
    ),
    "law": (
        "evals/registry/data/us_tort_law/samples.jsonl",
        "43a09dbd02b7b114bcfb49fe42587e2e9bbd810898664423c2befd9312916926",
    ),
}
EVERY = {"medicine": 5, "law": 10}  # of so many questions the last one is held out
ASKED = (
    "Is this headline good or bad news for the company's shareholders? Answer with one word: positive, negative or "
    "neutral.\n\n"
)

Talk = list[dict[str, str]]


def load(name: str, cache_dir: str | None = None, report: files.Report = print) -> dict[str, list[Talk]]:
    """The conversations of ``train`` and ``validation`` of a domain; what is fetched is fetched once.

    Raises:
        KeyError: there is no such domain.
        Failure: the package cannot be had, or is not the pinned one.
    """
    return DOMAINS[name](name, cache_dir, report)


def _finance(name: str, cache_dir: str | None, report: files.Report) -> dict[str, list[Talk]]:
    splits = {"train": headlines.headlines("train"), "validation": headlines.headlines("validation")}
    return {split: [_talk(ASKED + one.text, one.sentiment) for one in found] for split, found in splits.items()}


def _exam(name: str, cache_dir: str | None, report: files.Report) -> dict[str, list[Talk]]:
    paths = packages.fetch(*PACKAGE, dict(MEMBERS.values()), cache_dir=cache_dir, report=report)
    return split(questions(paths[MEMBERS[name][0]]), EVERY[name])


def questions(path: Path) -> list[Talk]:
    """The questions of a file of ``evals`` and their answers; what the system is told stands before the question."""
    records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    asked = ["\n\n".join(message["content"] for message in record["input"]) for record in records]
    return [_talk(question, record["ideal"]) for question, record in zip(asked, records, strict=True)]


def split(talks: list[Talk], every: int) -> dict[str, list[Talk]]:
    """The last of ``every`` so many is held out."""
    learned = [one for place, one in enumerate(talks, 1) if place % every]
    return {"train": learned, "validation": talks[every - 1 :: every]}


def _talk(question: str, answer: str) -> Talk:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


DOMAINS: dict[str, Callable[[str, str | None, files.Report], dict[str, list[Talk]]]] = {
    "finance": _finance,
    "medicine": _exam,
    "law": _exam,
}
