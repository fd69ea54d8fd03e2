"""From a text to batches: what is stored, the order it comes in, resuming, hosts and evaluation."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from documents import LENGTH, documents_of, rows_of, silent

from xylem.data import pipeline
from xylem.data.config import DataConfig
from xylem.data.ramp import BatchRamp
from xylem.errors import ConfigError


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
        assert prepared.counts[split]["bytes"] == sum(len(text.encode()) for text in expected)
        assert prepared.counts[split]["documents"] == len(expected)
        assert prepared.counts[split]["windows"] == len(source) == -(-(len(stream) - 1) // LENGTH)


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
    batch = next(pipeline.TrainIterator(prepared, 5, seed=3))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "tokens": ((5, LENGTH), np.int32),
        "labels": ((5, LENGTH), np.int32),
        "segments": ((5, LENGTH), np.int32),
        "weights": ((5, LENGTH), np.float32),
    }
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def test_order_is_a_function_of_the_seed(prepared, rng_seed):
    first, second, other = (
        rows_of(pipeline.TrainIterator(prepared, 4, seed), 40) for seed in (rng_seed, rng_seed, rng_seed + 1)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_each_epoch_has_every_window_once_in_a_new_order(prepared):
    windows = prepared.counts["train"]["windows"]
    batches = pipeline.TrainIterator(prepared, 1, seed=5)
    epochs = [[row.tobytes() for row in rows_of(batches, windows)] for _ in range(3)]
    stored = [record["tokens"][:-1].tobytes() for record in prepared.source("train")]
    assert all(sorted(epoch) == sorted(stored) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, stored]}) == 4


def test_batches_run_across_the_end_of_an_epoch(prepared):
    windows = prepared.counts["train"]["windows"]
    one_by_one = rows_of(pipeline.TrainIterator(prepared, 1, seed=5), 3 * windows)
    by_seven = rows_of(pipeline.TrainIterator(prepared, 7, seed=5), 3 * windows // 7)
    np.testing.assert_array_equal(by_seven, one_by_one[: len(by_seven)])


@pytest.mark.parametrize("stop", [1, 9, 50])
def test_resuming_continues_the_order(stop, prepared, rng_seed):
    whole = rows_of(pipeline.TrainIterator(prepared, 6, rng_seed), 60)
    begun = pipeline.TrainIterator(prepared, 6, rng_seed)
    rows_of(begun, stop)
    state = json.loads(json.dumps(begun.get_state()))
    assert state["step"] == stop
    resumed = pipeline.TrainIterator(prepared, 6, rng_seed)
    next(resumed)
    resumed.set_state(state)
    np.testing.assert_array_equal(rows_of(resumed, 60 - stop), whole[6 * stop :])
    started = pipeline.TrainIterator(prepared, 6, rng_seed, start_step=stop)
    np.testing.assert_array_equal(rows_of(started, 60 - stop), whole[6 * stop :])
    assert started.get_state()["step"] == 60


@pytest.mark.parametrize("hosts", [2, 3])
def test_any_number_of_hosts_sees_the_rows_of_one(hosts, prepared):
    whole = pipeline.TrainIterator(prepared, 6, seed=1, start_step=11)
    parts = [
        pipeline.TrainIterator(prepared, 6, seed=1, start_step=11, process_index=h, process_count=hosts)
        for h in range(hosts)
    ]
    for _ in range(30):
        expected, local = next(whole), [next(part) for part in parts]
        for host, batch in enumerate(local):
            for key in expected:
                np.testing.assert_array_equal(batch[key], expected[key][host::hosts])


@pytest.mark.parametrize("change", [{"seed": 2}, {"batch_size": 3}])
def test_a_state_of_another_order_is_refused(change, prepared):
    state = pipeline.TrainIterator(prepared, **({"batch_size": 6, "seed": 1} | change)).get_state()
    iterator = pipeline.TrainIterator(prepared, 6, seed=1)
    with pytest.raises(ConfigError, match="its order is another"):
        iterator.set_state(state)
    with pytest.raises(ConfigError, match="ramp: None is not possible"):
        iterator.set_state(pipeline.TrainIterator(prepared, 6, seed=1, ramp=BatchRamp(1, 2, 39, 100)).get_state())
    with pytest.raises(ConfigError, match="step"):
        iterator.set_state(iterator.get_state() | {"step": -1})


@pytest.mark.parametrize("batch_size", [1, 3, 4, 1000])
def test_evaluation_row_by_row_reads_the_text_in_order(prepared, batch_size):
    batches = list(pipeline.eval_batches(prepared, "validation", batch_size, order="consecutive"))
    rows = zip(*(zip(batch["labels"], batch["weights"], strict=True) for batch in batches), strict=True)
    side_by_side = [token for row in rows for labels, weights in row for token in labels[weights == 1]]
    in_order = [batch["labels"][batch["weights"] == 1] for batch in pipeline.eval_batches(prepared, "validation", 4)]
    np.testing.assert_array_equal(side_by_side, np.concatenate(in_order))


def test_evaluation_counts_every_label_once(prepared):
    for batch_size in (1, 4, 1000):
        labels = []
        for batch in pipeline.eval_batches(prepared, "validation", batch_size):
            assert batch["tokens"].shape == (batch_size, LENGTH)
            labels += batch["labels"][batch["weights"] == 1].tolist()
            assert (batch["segments"][batch["weights"] == 1] > 0).all()
        opened = "".join("<|endoftext|>" + text for text in documents_of(7)[54:])
        assert prepared.tokenizer.decode([prepared.tokenizer.end_of_text, *labels]) == opened


@pytest.mark.parametrize("order", ["text", "consecutive"])
def test_evaluation_on_two_hosts_is_that_on_one(prepared, order):
    read = partial(pipeline.eval_batches, prepared, "validation", 4, order=order)
    whole = list(read())
    parts = [list(read(process_index=h, process_count=2)) for h in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for expected, *local in zip(whole, *parts, strict=True):
        for host, batch in enumerate(local):
            np.testing.assert_array_equal(batch["labels"], expected["labels"][host::2])
            np.testing.assert_array_equal(batch["weights"], expected["weights"][host::2])


def test_sizes_that_hosts_or_splits_do_not_allow_are_refused(prepared):
    for call, words in [
        (lambda: pipeline.TrainIterator(prepared, 5, 0, process_count=2), "multiple of the 2 hosts"),
        (lambda: pipeline.TrainIterator(prepared, 0, 0), "batch_size"),
        (lambda: pipeline.TrainIterator(prepared, 4, -1), "seed: -1"),
        (lambda: pipeline.TrainIterator(prepared, 4, 0, process_index=2, process_count=2), "process_index"),
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


def test_preparing_and_reading_never_imports_tensorflow_or_starts_jax(corpus, tmp_path):
    config = DataConfig(corpus=corpus[0], tokenizer="bytes", sequence_length=LENGTH, cache_dir=str(tmp_path))
    code = (
        "import sys; from xylem.data import pipeline; from xylem.data.config import DataConfig\n"
        f"done = pipeline.prepare({config!r}, lambda line: None)\n"
        "next(pipeline.TrainIterator(done, 2, 0)); next(pipeline.eval_batches(done, 'validation', 2))\n"
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
    found = {split: counts["bytes"] for split, counts in done.counts.items()}
    assert found == {"train": 10_940_747, "validation": 1_146_846, "test": 1_290_590}
    text = next(corpora.open_corpus(DataConfig(), silent).splits["validation"]())
    ids = done.tokenizer.encode(text)
    assert done.tokenizer.decode(ids) == text
    np.testing.assert_array_equal(done.source("validation")[0]["tokens"][1:], ids[: done.config.sequence_length])
    assert sum(batch["weights"].sum() for batch in pipeline.eval_batches(done, "validation", 16)) == (
        done.counts["validation"]["tokens"] - 1
    )
