"""The whole way from text to batches: what is stored, the order it comes in, resuming, and what stops it."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from xylem import files
from xylem.data import builders, pipeline
from xylem.data.config import DataConfig
from xylem.errors import CheckpointError, ConfigError

LENGTH = 13


def silent(_: str) -> None:
    """A report nobody reads."""


def documents_of(seed, count=60):
    rng = np.random.default_rng(seed)
    words = np.array(["tree", "xylem", "über", "42", "☃", "\n", "sap", "a,"])
    return [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 documents as JSONL, and the cache that their prepared forms share."""
    folder = tmp_path_factory.mktemp("corpus")
    return write_jsonl(folder / "a.jsonl", documents_of(7)), str(folder / "cache")


@pytest.fixture(scope="module")
def prepared(corpus):
    file, cache = corpus
    config = DataConfig(corpus=file, tokenizer="bpe:300", sequence_length=LENGTH, cache_dir=cache)
    return pipeline.prepare(config, silent)


def rows_of(batches, count):
    return np.concatenate([next(batches)["tokens"] for _ in range(count)])


def test_the_stored_windows_spell_the_corpus(prepared):
    texts = documents_of(7)
    for split, expected in (("train", texts[:54]), ("validation", texts[54:])):
        source = prepared.source(split)
        stream = [int(source[0]["tokens"][0])]
        for number in range(len(source)):
            tokens, segments = source[number]["tokens"], source[number]["segments"]
            assert tokens.dtype == segments.dtype == np.int32
            assert tokens.shape == segments.shape == (LENGTH + 1,)
            stream += tokens[1:][segments[1:] > 0].tolist()
        assert len(stream) == prepared.counts[split]["tokens"]
        opened = "".join(prepared.tokenizer.decode([token]) if token == 0 else "" for token in stream)
        assert opened == "<|endoftext|>" * len(expected)
        assert prepared.tokenizer.decode(stream) == "".join("<|endoftext|>" + text for text in expected)
        assert prepared.bytes[split] == sum(len(text.encode()) for text in expected)
        assert prepared.counts[split]["documents"] == len(expected)
        assert prepared.records[split] == len(source) == -(-(len(stream) - 1) // LENGTH)


def test_documents_come_back_whole(prepared):
    texts = documents_of(7)
    for split, expected in (("train", texts[:54]), ("validation", texts[54:])):
        assert [prepared.tokenizer.decode(ids) for ids in prepared.documents(split)] == expected


def test_segments_part_the_documents(prepared):
    for batch in pipeline.eval_batches(prepared, "train", 4):
        for tokens, segments, weights in zip(batch["tokens"], batch["segments"], batch["weights"], strict=True):
            real = segments > 0
            opened = np.cumsum(tokens[1:] == prepared.tokenizer.end_of_text) * real[1:]
            np.testing.assert_array_equal(segments[1:][real[1:]], (segments[0] + opened)[real[1:]])
            assert set(weights) <= {0.0, 1.0}


def test_the_dataset_card_names_tokenizer_and_counts(prepared):
    info = prepared._builder.info
    assert info.metadata["tokenizer_hash"] == prepared.tokenizer.hash
    assert info.metadata["splits"] == prepared.counts
    assert info.disable_shuffling
    assert info.file_format.value == "array_record"


def test_a_batch_has_shifted_labels_and_its_types(prepared):
    batch = next(pipeline.train_iterator(prepared, 5, seed=3))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "tokens": ((5, LENGTH), np.int32),
        "labels": ((5, LENGTH), np.int32),
        "segments": ((5, LENGTH), np.int32),
        "weights": ((5, LENGTH), np.float32),
    }
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def test_order_is_a_function_of_the_seed(prepared, rng_seed):
    first, second, other = (
        rows_of(pipeline.train_iterator(prepared, 4, seed), 40) for seed in (rng_seed, rng_seed, rng_seed + 1)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_each_epoch_has_every_window_once_in_a_new_order(prepared):
    windows = prepared.records["train"]
    batches = pipeline.train_iterator(prepared, 1, seed=5)
    epochs = [[row.tobytes() for row in rows_of(batches, windows)] for _ in range(3)]
    stored = [record["tokens"][:-1].tobytes() for record in prepared.source("train")]
    assert all(sorted(epoch) == sorted(stored) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, stored]}) == 4


def test_batches_run_across_the_end_of_an_epoch(prepared):
    windows = prepared.records["train"]
    one_by_one = rows_of(pipeline.train_iterator(prepared, 1, seed=5), 3 * windows)
    by_seven = rows_of(pipeline.train_iterator(prepared, 7, seed=5), 3 * windows // 7)
    np.testing.assert_array_equal(by_seven, one_by_one[: len(by_seven)])


@pytest.mark.parametrize("stop", [1, 9, 50])
def test_resuming_continues_the_order(stop, prepared, rng_seed):
    whole = rows_of(pipeline.train_iterator(prepared, 6, rng_seed), 60)
    begun = pipeline.train_iterator(prepared, 6, rng_seed)
    rows_of(begun, stop)
    state = json.loads(json.dumps(begun.get_state()))
    assert state["step"] == stop
    resumed = pipeline.train_iterator(prepared, 6, rng_seed)
    next(resumed)
    resumed.set_state(state)
    np.testing.assert_array_equal(rows_of(resumed, 60 - stop), whole[6 * stop :])
    started = pipeline.train_iterator(prepared, 6, rng_seed, start_step=stop)
    np.testing.assert_array_equal(rows_of(started, 60 - stop), whole[6 * stop :])
    assert started.get_state()["step"] == 60


@pytest.mark.parametrize("hosts", [2, 3])
def test_any_number_of_hosts_sees_the_rows_of_one(hosts, prepared):
    whole = pipeline.train_iterator(prepared, 6, seed=1, start_step=11)
    parts = [
        pipeline.train_iterator(prepared, 6, seed=1, start_step=11, process_index=h, process_count=hosts)
        for h in range(hosts)
    ]
    for _ in range(30):
        expected, local = next(whole), [next(part) for part in parts]
        for host, batch in enumerate(local):
            for key in expected:
                np.testing.assert_array_equal(batch[key], expected[key][host::hosts])


@pytest.mark.parametrize("change", [{"seed": 2}, {"batch_size": 3}])
def test_a_state_of_another_order_is_refused(change, prepared):
    state = pipeline.train_iterator(prepared, **({"batch_size": 6, "seed": 1} | change)).get_state()
    iterator = pipeline.train_iterator(prepared, 6, seed=1)
    with pytest.raises(ConfigError, match="its order is another"):
        iterator.set_state(state)
    with pytest.raises(ConfigError, match="step"):
        iterator.set_state(iterator.get_state() | {"step": -1})


def test_evaluation_counts_every_label_once(prepared):
    for batch_size in (1, 4, 1000):
        labels = []
        for batch in pipeline.eval_batches(prepared, "validation", batch_size):
            assert batch["tokens"].shape == (batch_size, LENGTH)
            labels += batch["labels"][batch["weights"] == 1].tolist()
            assert (batch["segments"][batch["weights"] == 1] > 0).all()
        opened = "".join("<|endoftext|>" + text for text in documents_of(7)[54:])
        assert prepared.tokenizer.decode([prepared.tokenizer.end_of_text, *labels]) == opened


def test_evaluation_on_two_hosts_is_that_on_one(prepared):
    whole = list(pipeline.eval_batches(prepared, "validation", 4))
    parts = [list(pipeline.eval_batches(prepared, "validation", 4, process_index=h, process_count=2)) for h in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for expected, *local in zip(whole, *parts, strict=True):
        for host, batch in enumerate(local):
            np.testing.assert_array_equal(batch["labels"], expected["labels"][host::2])
            np.testing.assert_array_equal(batch["weights"], expected["weights"][host::2])


def test_sizes_that_hosts_or_splits_do_not_allow_are_refused(prepared):
    for call, words in [
        (lambda: pipeline.train_iterator(prepared, 5, 0, process_count=2), "multiple of the 2 hosts"),
        (lambda: pipeline.train_iterator(prepared, 0, 0), "batch_size"),
        (lambda: pipeline.train_iterator(prepared, 4, -1), "seed: -1"),
        (lambda: pipeline.train_iterator(prepared, 4, 0, process_index=2, process_count=2), "process_index"),
        (lambda: next(pipeline.eval_batches(prepared, "vaildation", 4)), "did you mean 'validation'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            call()


def test_ids_outside_the_vocabulary_name_their_record(prepared):
    class Damaged:
        def __getitems__(self, rows):
            good = {"tokens": np.zeros(LENGTH + 1, np.int32), "segments": np.ones(LENGTH + 1, np.int32)}
            return [good if row != 8 else good | {"tokens": good["tokens"] + 999} for row in rows]

    with pytest.raises(ConfigError, match=r"token id: 999.*record 8 of"):
        prepared.batch(Damaged(), [5, 8, 2])


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
    assert next(pipeline.train_iterator(other, 2, 0))["tokens"].shape == (2, fields["sequence_length"])


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
            way: rows_of(pipeline.train_iterator(pipeline.prepare(DataConfig(**fields, **common), silent), 3, 0), 20)
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
    assert pipeline.prepare(config, silent).records["train"] > 0


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
    assert len(done.source("train")) == done.records["train"]


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


def test_preparing_and_reading_never_imports_tensorflow_or_starts_jax(corpus, tmp_path):
    config = DataConfig(corpus=corpus[0], tokenizer="bytes", sequence_length=LENGTH, cache_dir=str(tmp_path))
    code = (
        "import sys; from xylem.data import pipeline; from xylem.data.config import DataConfig\n"
        f"done = pipeline.prepare({config!r}, lambda line: None)\n"
        "next(pipeline.train_iterator(done, 2, 0)); next(pipeline.eval_batches(done, 'validation', 2))\n"
        "assert not {'tensorflow', 'torch'} & {*sys.modules}\n"
        "if 'jax' in sys.modules:\n"
        "    from jax._src import xla_bridge\n"
        "    assert not xla_bridge._backends\n"
        "print('clean')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert finished.stdout == "clean\n", finished.stderr


def test_wikitext2_is_the_default_corpus_and_loses_nothing():
    from xylem.data import corpora

    done = pipeline.prepare(DataConfig(), silent)
    assert done.counts["train"]["documents"] == 600
    assert done.bytes == {"train": 10_940_747, "validation": 1_146_846, "test": 1_290_590}
    text = next(corpora.open_corpus(DataConfig(), silent).splits["validation"]())
    ids = done.tokenizer.encode(text)
    assert done.tokenizer.decode(ids) == text
    np.testing.assert_array_equal(done.source("validation")[0]["tokens"][1:], ids[: done.config.sequence_length])
    assert sum(batch["weights"].sum() for batch in pipeline.eval_batches(done, "validation", 16)) == (
        done.counts["validation"]["tokens"] - 1
    )
