"""The ladder as a user climbs it, on a text of a few hundred words."""

import json
import sys
from types import SimpleNamespace

import pytest
from documents import documents_of, write_jsonl
from programs import run, script

from xylem.errors import ConfigError, Failure


@pytest.fixture
def flags(tmp_path):
    corpus = write_jsonl(tmp_path / "text.jsonl", documents_of(5))
    where = ("--data.corpus", corpus, "--data.cache-dir", str(tmp_path / "cache"), "--data.tokenizer", "bytes")
    sizes = ("--data.sequence-length", "32", "--width", "32", "--batch-size", "8")
    return (*where, *sizes, "--run-dir", str(tmp_path / "ladder"))


@pytest.mark.slow
def test_each_rung_reads_the_text_once_and_is_not_climbed_again(flags, tmp_path):
    done = run("ladder", *flags, "--rungs", "ngram", "lstm")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert [row["rung"] for row in rows] == ["ngram", "lstm"]
    counted, trained = rows
    assert 0 <= counted["tokens"] - trained["tokens"] < 8 * 32, "one pass of whole batches"
    for row in rows:
        assert len(row["curve"]) >= 6 and row["curve"][-1][0] <= row["tokens"]
        assert row["memory"] > 1e8 and f"{row['bits_per_byte']:.3f}" in done.stdout
    assert trained["curve"][0][1] > trained["bits_per_byte"], "it has learned"
    assert counted["curve"][0][1] > counted["bits_per_byte"]
    assert (tmp_path / "ladder" / "ladder.png").read_bytes().startswith(b"\x89PNG")
    again = run("ladder", *flags, "--rungs", "lstm", "ngram")
    assert again.returncode == 0 and "step" not in again.stdout
    with pytest.raises(ConfigError, match="rung ngram was climbed with"):
        script("ladder")([*flags, "--rungs", "ngram", "--documents", "9"])


def test_rungs_have_about_as_many_parameters():
    script("ladder")
    ladder = sys.modules["script_ladder"]
    data = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=4096), counts={"train": {"windows": 12_000}})
    runs = {rung: ladder.run_of(rung, ladder.Arguments(), data) for rung in ladder.RATES}
    sizes = {rung: ladder.parameters(run) for rung, run in runs.items()}
    assert all(abs(size / sizes["llama"] - 1) < 0.05 for size in sizes.values()), sizes


def test_a_rung_that_fails_is_named_and_the_others_are_kept(flags):
    with pytest.raises(Failure, match="rung gpt2 ended with code 2"):
        script("ladder")([*flags, "--rungs", "gpt2", "--data.tokenizer", "nothing.json"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--width", "33"], "width: 33"), (["--batch-size", "0"], "batch_size: 0"), (["--rungs"], "rungs")],
)
def test_ladder_mistakes_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        script("ladder")(arguments)
