"""What the tests of whole runs share."""

from functools import partial
from pathlib import Path

import families
import pytest
from documents import documents_of, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small corpus, and where the runs of a module keep what they make."""
    made = tmp_path_factory.mktemp("families")
    write_jsonl(made / "a.jsonl", documents_of(7))
    return made


@pytest.fixture(scope="module")
def run_of(folder):
    """``run_of(family, name="run", **changes)``: a run of a few steps (see ``families.run``)."""
    return partial(families.run, folder)
