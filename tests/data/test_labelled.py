"""Labelled texts as rows."""

import json

import numpy as np
import pytest

from xylem.data import labelled, tokenizers
from xylem.data.config import DataConfig
from xylem.data.pretrained import pretrained
from xylem.errors import ConfigError


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def rows_of(tmp_path, tokenizer, *records, length=16, types="absent", **values):
    corpus = write(tmp_path / "a.jsonl", *records)
    data, names = labelled.prepare(DataConfig(corpus, sequence_length=length, **values), tokenizer, types)
    return data, names


def test_a_decoder_reads_a_text_and_its_end(tmp_path):
    plain = tokenizers.byte_level()
    records = [{"text": "good", "label": "yes"}, {"text": "a very long text indeed", "label": "no"}] * 5
    data, names = rows_of(tmp_path, plain, *records)
    assert names == ["no", "yes"]
    first, second = data.source("train")[:2]
    assert plain.decode(first["tokens"][first["segments"] > 0]) == "<|endoftext|>good<|endoftext|>"
    assert first["labels"] == 1 and second["labels"] == 0 and first["weights"] == 1
    assert plain.decode(second["tokens"]) == "<|endoftext|>a very long te<|endoftext|>"
    batch = data.batch(data.source("train"), [0, 1], pad_to=3)
    assert batch["labels"].shape == (3,) and batch["weights"].tolist() == [1, 1, 0]


def test_an_encoder_reads_pairs_between_its_own_tokens(tmp_path):
    bert = tokenizers.load(pretrained("minilm"))
    records = [{"text": "a man", "text_pair": "a woman and a dog", "label": place % 3} for place in range(9)]
    data, names = rows_of(tmp_path, bert, *records, types="present")
    assert names == ["0", "1", "2"]
    row = data.source("train")[0]
    real = row["segments"] > 0
    assert bert.decode(row["tokens"][real]).split() == [
        "[CLS]",
        "a",
        "man",
        "[SEP]",
        "a",
        "woman",
        "and",
        "a",
        "dog",
        "[SEP]",
    ]
    np.testing.assert_array_equal(row["token_types"][real], [0] * 4 + [1] * 6)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"text": "a"}] * 4, "each line is"),
        ([{"text": " ", "label": 1}] * 4, "each line is"),
        ([{"text": "a", "label": "x"}] * 4, "at least two labels"),
        (
            [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}] * 3 + [{"text": "a", "label": "z"}],
            "labels are x, y",
        ),
    ],
)
def test_lines_and_labels_that_do_not_fit_are_named(tmp_path, records, said):
    with pytest.raises(ConfigError, match=said):
        rows_of(tmp_path, tokenizers.byte_level(), *records)
