"""The run of an n-gram model: what it leaves behind, and that the scripts use it as any other model."""

import json

import numpy as np
import pytest
from documents import documents_of, write_jsonl
from programs import script

from xylem.data import pipeline
from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.models import ngram
from xylem.models.ngram_file import NGRAM, load_tree
from xylem.training import metrics


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counted")
    data = {"corpus": write_jsonl(folder / "text.jsonl", documents_of(3)), "cache_dir": str(folder / "cache")}
    script("pretrain")(["ngram", "--order", "3", *where(data), "--run-dir", str(folder / "run")])
    return data, folder / "run"


def where(data):
    return ("--data.corpus", data["corpus"], "--data.cache-dir", data["cache_dir"], "--data.tokenizer", "bytes")


def test_summary_is_what_plain_counting_and_scoring_give(flags):
    data, folder = flags
    prepared = pipeline.prepare(DataConfig(**data, tokenizer="bytes"))
    text = "".join(prepared.corpus.splits["validation"]())
    end = prepared.tokenizer.end_of_text
    config = ngram.NGramConfig(prepared.tokenizer.vocab_size, end, 3)
    tree = ngram.count(prepared.documents("train"), config)
    score = ngram.score(config, tree, prepared.documents("validation"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_loss"] == pytest.approx(score.nll / score.weight, rel=1e-12)
    bits = metrics.bits_per_byte(score.nll, len(text.encode()))
    assert summary["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    assert summary["parameters"] == sum(len(tree[f"grams/{k}/tokens"]) for k in (1, 2, 3))
    assert (folder / "sample.txt").read_text().startswith("The history of")
    read, arrays, tokenizer_hash = load_tree(folder / NGRAM)
    assert read == config and tokenizer_hash == prepared.tokenizer.hash and arrays.keys() == tree.keys()
    assert all(np.array_equal(arrays[name], tree[name]) for name in tree)


def test_evaluate_and_generate_open_a_counted_model(flags, capfd):
    _, folder = flags
    summary = json.loads((folder / "summary.json").read_text())
    script("evaluate")([str(folder)])
    assert f"{summary['validation_bits_per_byte']:.3f} bits per byte" in capfd.readouterr().out
    script("generate")([str(folder), "--prompt", "tree", "--max-new-tokens", "4"])
    assert capfd.readouterr().out.startswith("tree")
    with pytest.raises(ConfigError, match="limit: 2"):
        script("evaluate")([str(folder), "--limit", "2"])


def test_the_same_command_counts_again_and_another_is_refused(flags):
    data, folder = flags
    before = load_tree(folder / NGRAM)[1]
    script("pretrain")(["ngram", "--order", "3", *where(data), "--run-dir", str(folder)])
    after = load_tree(folder / NGRAM)[1]
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="order: there 3, now 2"):
        script("pretrain")(["ngram", "--order", "2", *where(data), "--run-dir", str(folder)])


@pytest.mark.parametrize("place", [-1, 9])
def test_a_damaged_model_is_refused(flags, tmp_path, place):
    content = bytearray((flags[1] / NGRAM).read_bytes())
    content[place] ^= 1
    (tmp_path / NGRAM).write_bytes(content)
    with pytest.raises(ConfigError, match=NGRAM):
        load_tree(tmp_path / NGRAM)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--order", "0"], "order: 0"), (["--smoothing", "laplace", "--discount", "0.5"], "discount: 0.5")],
)
def test_mistakes_of_counting_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        script("pretrain")(["ngram", *arguments])


def test_nothing_that_trains_takes_a_counting_preset():
    with pytest.raises(ConfigError, match="PRESET: 'ngram'"):
        script("plan")(["ngram"])
