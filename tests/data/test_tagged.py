"""Words with labels as rows."""

import json

import numpy as np
import pytest

from xylem.data import tagged, tokenizers
from xylem.data.config import DataConfig
from xylem.errors import ConfigError

PLAIN = tokenizers.byte_level()


def rows_of(tmp_path, *records, length=16, **values):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return tagged.prepare(DataConfig(str(path), sequence_length=length), PLAIN, "absent", **values)


def test_a_word_has_its_label_at_its_first_piece(tmp_path):
    data, names = rows_of(tmp_path, *[{"words": ["Ada", "is", "in", "Ur"], "labels": ["P", "O", "O", "L"]}] * 4)
    assert names == ["L", "O", "P"]
    (row, *_) = data.source("train")
    assert PLAIN.decode(row["tokens"][row["segments"] > 0]) == "<|endoftext|>Ada is in Ur<|endoftext|>"
    # The space in front belongs to the word, whose first piece it is.
    np.testing.assert_array_equal(np.flatnonzero(row["weights"]), [1, 4, 7, 10])
    assert row["labels"][[1, 4, 7, 10]].tolist() == [2, 1, 1, 0] and row["weights"].dtype == np.float32
    assert data.batch(data.source("train"), [0], pad_to=2)["weights"][1].sum() == 0


def test_words_beyond_the_row_are_left_out(tmp_path):
    record = {"words": ["abc", "de", "f"], "labels": [0, 1, 0]}
    data, _ = rows_of(tmp_path, *[record] * 3, length=7)
    row = data.source("train")[0]
    assert PLAIN.decode(row["tokens"]) == "<|endoftext|>abc d<|endoftext|>"
    np.testing.assert_array_equal(np.flatnonzero(row["weights"]), [1, 4])
    assert tagged.row(PLAIN, record["words"], 7, "absent")[1].tolist() == [1, 4, -1]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"words": ["a"], "labels": []}, "each line is"),
        ({"words": ["a", "b"], "labels": ["x"]}, "each line is"),
        ({"words": ["a", " "], "labels": ["x", "y"]}, "each line is"),
        ({"words": "ab", "labels": "xy"}, "each line is"),
        ({"words": ["a", "b"], "labels": ["x", "x"]}, "at least two labels"),
    ],
)
def test_lines_without_a_label_for_each_word_are_named(tmp_path, record, said):
    with pytest.raises(ConfigError, match=said):
        rows_of(tmp_path, *[record] * 3)


def test_labels_that_a_model_does_not_know_are_named(tmp_path):
    record = {"words": ["a", "b"], "labels": ["x", "y"]}
    assert rows_of(tmp_path, *[record] * 3, known=["y", "z", "x"])[1] == ["y", "z", "x"]
    with pytest.raises(ConfigError, match="the labels are x, z"):
        rows_of(tmp_path, *[record] * 3, known=["x", "z"])
