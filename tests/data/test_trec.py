"""TREC's questions by name."""

from documents import silent

from xylem.data import labelled, trec
from xylem.data.config import DataConfig
from xylem.data.tokenizers import byte_level


def test_questions_are_read_as_they_were_published():
    splits = trec.load(report=silent)
    assert len(splits["validation"]) == 500 and len({label for _, _, label in splits["train"]}) == 6
    held = {text for text, _, _ in splits["validation"]}
    assert not held & {text for text, _, _ in splits["train"]}
    assert 5400 < len(splits["train"]) <= 5452
    assert splits["train"][0] == ("How did serfdom develop in and then leave Russia ?", "", "0")


def test_the_set_is_prepared_as_a_file_is():
    data, labels = labelled.prepare(DataConfig("trec", sequence_length=24), byte_level(), "absent")
    assert len(labels) == 6 and data.counts["validation"]["documents"] == 500
