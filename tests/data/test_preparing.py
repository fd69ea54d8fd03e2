"""Preparing a corpus: what is kept and found again, what is refused, and that a failure leaves nothing half-done."""

import errno
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from documents import LENGTH, documents_of, rows_of, silent, write_jsonl

from xylem import files
from xylem.data import builders, pipeline
from xylem.data.config import DataConfig
from xylem.errors import CheckpointError, ConfigError


def test_a_second_call_finds_the_first_ones_work(prepared, monkeypatch):
    def never(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(pipeline, "_build", never)
    lines = []
    again = pipeline.prepare(prepared.config, lines.append)
    assert (again.key, again.counts, lines) == (prepared.key, prepared.counts, [])
    assert again.tokenizer.hash == prepared.tokenizer.hash


@pytest.mark.parametrize(
    "change",
    [{"sequence_length": 5}, {"tokenizer": "bytes"}, {"tokenizer": "characters"}, {"validation_fraction": 0.5}],
)
def test_another_config_is_another_dataset(change, corpus, prepared):
    fields = {"tokenizer": "bpe:300", "sequence_length": LENGTH} | change
    other = pipeline.prepare(DataConfig(corpus=corpus[0], cache_dir=corpus[1], **fields), silent)
    assert other.key != prepared.key
    assert next(pipeline.TrainIterator(other, 2, 0))["tokens"].shape == (2, fields["sequence_length"])


def test_text_and_jsonl_and_tfds_give_the_same_batches(tmp_path, prepared):
    """One text on three ways; the third is a TFDS builder of the user's own, fed by hand through manual_dir."""
    texts = documents_of(11, 12)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02}.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "xylem_test_builder.py").write_text(
        textwrap.dedent('''
        import json
        import numpy as np
        import tensorflow_datasets as tfds

        class HandMade(tfds.core.GeneratorBasedBuilder):
            """JSON lines that the user puts into manual_dir."""
            VERSION = tfds.core.Version("1.0.0")
            MANUAL_DOWNLOAD_INSTRUCTIONS = "a.jsonl in manual_dir"

            def _info(self):
                features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "length": np.int64})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(dl_manager.manual_dir / "a.jsonl")}

            def _generate_examples(self, path):
                for number, line in enumerate(path.read_text().splitlines()):
                    text = json.loads(line)["text"]
                    yield number, {"body": text, "length": len(text)}
        ''')
    )
    sys.path.insert(0, str(tmp_path))
    ways = {
        "text": {"corpus": str(tmp_path / "texts")},
        "jsonl": {"corpus": str(tmp_path / "a.jsonl")},
        "tfds": {"corpus": "tfds:hand_made", "manual_dir": str(tmp_path), "builder_module": "xylem_test_builder"},
    }
    common = {"tokenizer": "bytes", "sequence_length": 8, "cache_dir": str(tmp_path / "cache")}
    try:
        rows = {
            way: rows_of(pipeline.TrainIterator(pipeline.prepare(DataConfig(**fields, **common), silent), 3, 0), 20)
            for way, fields in ways.items()
        }
        with pytest.raises(ConfigError, match="hand_made: body"):
            pipeline.prepare(DataConfig(**(ways["tfds"] | {"corpus": "tfds:hand_made:length"}), **common), silent)
    finally:
        sys.path.remove(str(tmp_path))
    np.testing.assert_array_equal(rows["text"], rows["jsonl"])
    np.testing.assert_array_equal(rows["text"], rows["tfds"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"corpus": "tfds:no_such_builder_at_all"}, "registered TFDS builder"),
        ({"corpus": "tfds:x", "builder_module": "no_such_module"}, "data.builder_module"),
        ({"tokenizer": "byte"}, "did you mean 'bytes'"),
        ({"tokenizer": "nowhere/tokenizer.json"}, "data.tokenizer.*allowed"),
        ({"sequence_length": 100_000}, "less than a window"),
        ({"cache_dir": "/proc/none"}, "data.cache_dir"),
    ],
)
def test_a_config_that_cannot_be_prepared_says_why(fields, words, corpus):
    usual = {"corpus": corpus[0], "cache_dir": corpus[1], "tokenizer": "bytes"}
    with pytest.raises(ConfigError, match=words):
        pipeline.prepare(DataConfig(**(usual | fields)), silent)


def test_an_empty_validation_split_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("enough text for a window")
    (tmp_path / "validation.txt").write_text("")
    config = DataConfig(
        corpus=str(tmp_path / "train.txt"),
        validation=str(tmp_path / "validation.txt"),
        tokenizer="bytes",
        sequence_length=4,
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(ConfigError, match="validation split is empty"):
        pipeline.prepare(config, silent)
    assert not list((tmp_path / "cache" / "packed").glob("*/manifest.json"))


def left_behind(cache):
    """What a failed preparation may not leave: anything but lock files."""
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("at", ["mkdtemp", "generate", "rename"])
def test_a_full_disk_ends_in_one_message_and_leaves_nothing(at, corpus, tmp_path, monkeypatch):
    def full(*_, **__):
        # TFDS's ArrayRecord writer raises a RuntimeError with the system's words in it.
        raise RuntimeError("write() failed: No space left on device") if at == "generate" else OSError(errno.ENOSPC, "")

    target = {"mkdtemp": (files.tempfile, "mkdtemp"), "generate": (builders, "pack"), "rename": (files.os, "replace")}
    config = DataConfig(corpus=corpus[0], tokenizer="bytes", sequence_length=LENGTH, cache_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(*target[at], full)
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            pipeline.prepare(config, silent)
    assert caught.value.code == 4
    assert left_behind(tmp_path) == []
    assert pipeline.prepare(config, silent).counts["train"]["windows"] > 0


def test_a_killed_preparation_is_repeated_and_its_rest_removed(corpus, tmp_path):
    """The process dies between writing the windows and moving them: nothing counts, and the next call clears it."""
    config = DataConfig(corpus=corpus[0], tokenizer="bytes", sequence_length=LENGTH, cache_dir=str(tmp_path))
    code = (
        "import os; from xylem import files\n"
        "from xylem.data import pipeline; from xylem.data.config import DataConfig\n"
        "files.os.replace = lambda *_: os._exit(9)\n"
        f"pipeline.prepare({config!r}, lambda line: None)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert [path for path in left_behind(tmp_path) if ".building-" in str(path)]
    done = pipeline.prepare(config, silent)
    assert not [path for path in left_behind(tmp_path) if ".building-" in str(path)]
    assert len(done.source("train")) == done.counts["train"]["windows"]


def test_a_damaged_dataset_is_built_again(corpus, tmp_path):
    config = DataConfig(corpus=corpus[0], tokenizer="bytes", sequence_length=LENGTH, cache_dir=str(tmp_path))
    done = pipeline.prepare(config, silent)
    (record,) = done.folder.rglob("*train.array_record*")
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    pipeline.prepare(config, silent)
    assert record.stat().st_size == len(whole)


def test_two_processes_prepare_the_same_thing_once(corpus, tmp_path):
    config = DataConfig(corpus=corpus[0], tokenizer="bpe:280", sequence_length=LENGTH, cache_dir=str(tmp_path))
    code = (
        "import sys; from xylem.data import pipeline; from xylem.data.config import DataConfig\n"
        f"pipeline.prepare({config!r}, print)"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "".join(out for out, _ in outputs).count("packing a train") == 1
