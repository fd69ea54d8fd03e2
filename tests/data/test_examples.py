"""What objectives make of windows of text: nothing lost, nothing told, and drawn anew each epoch."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from documents import LENGTH, documents_of

from xylem.data import denoising, examples, masking, pipeline, spans
from xylem.data.corruption import generator, share
from xylem.data.paired import paired
from xylem.errors import ConfigError

MASK, CLS, SEP, START, SIZE = 300, 301, 302, 303, 310


def hidden(prepared, rate: float = 0.15):
    special = {prepared.tokenizer.end_of_text, MASK, CLS, SEP}
    hide = partial(masking.mask_tokens, special=special, mask_id=MASK, vocab_size=SEP + 1, rate=rate)
    return partial(examples.hidden_tokens, hide=hide, most=share(LENGTH, rate))


@pytest.fixture
def windows(prepared) -> list[dict]:
    """The records of the train split; the last one ends in padding."""
    source = prepared.source("train")
    records = list(source.__getitems__(list(range(len(source)))))
    assert (records[-1]["segments"] == 0).any()
    return records


def text_of(record: dict) -> np.ndarray:
    return record["tokens"][:-1][record["segments"][:-1] > 0]


def test_hidden_tokens_are_named_by_their_places(prepared, windows, rng_seed):
    make = hidden(prepared)
    for index, record in enumerate(windows):
        made, tokens = make(record, generator(rng_seed, 0, index)), record["tokens"][:-1]
        count = int(made["weights"].sum())
        places = made["places"][:count]
        assert count == max(1, round(0.15 * (tokens != prepared.tokenizer.end_of_text).sum()))
        np.testing.assert_array_equal(made["labels"][:count], tokens[places])
        untouched = np.delete(np.arange(LENGTH), places)
        np.testing.assert_array_equal(made["tokens"][untouched], tokens[untouched])
        assert (made["weights"][:count] == 1).all() and not made["places"][count:].any()


def test_randomness_comes_with_the_epoch(prepared, rng_seed):
    prepared = replace(prepared, example=hidden(prepared))
    count = len(prepared.source("train"))
    batches = pipeline.TrainIterator(prepared, 1, rng_seed)
    shown = [next(batches) for _ in range(2 * count)]
    later = pipeline.TrainIterator(prepared, 1, rng_seed, start_step=count + 3)
    np.testing.assert_array_equal(next(later)["tokens"], shown[count + 3]["tokens"])
    source = prepared.source("train")
    texts = {record["tokens"][:-1].tobytes(): row for row, record in enumerate(source.__getitems__(range(count)))}

    def restored(batch: dict) -> bytes:
        """The window before its tokens were hidden."""
        tokens = batch["tokens"][0].copy()
        real = batch["weights"][0] > 0
        tokens[batch["places"][0][real]] = batch["labels"][0][real]
        return tokens.tobytes()

    rows = [texts[restored(batch)] for batch in shown]
    assert sorted(rows[:count]) == sorted(rows[count:]) == list(range(count))
    changed = 0
    for epoch in (0, 1):
        for batch, row in zip(shown[epoch * count :], rows[epoch * count : (epoch + 1) * count], strict=False):
            again = prepared.batch(source, [row], [epoch], seed=rng_seed)
            np.testing.assert_array_equal(again["tokens"], batch["tokens"])
            changed += (prepared.batch(source, [row], [1 - epoch], seed=rng_seed)["tokens"] != again["tokens"]).any()
    assert changed > count  # most windows are hidden otherwise the next time


def test_corrupted_spans_rebuild_the_text(windows, rng_seed):
    settings = {"vocab_size": SIZE + 40, "end": 0, "start": START, "sentinels": 40}
    for index, record in enumerate(windows):
        rng = generator(rng_seed, 0, index)
        made = examples.corrupted_spans(record, rng, **settings, noise_density=0.2, mean_span=2.5)
        assert (len(made["tokens"]), len(made["labels"])) == spans.sizes(LENGTH, 0.2, 2.5)
        inputs, targets = made["tokens"][made["segments"] > 0], made["labels"][made["weights"] > 0]
        np.testing.assert_array_equal(spans.rebuild(inputs, targets, SIZE + 40, 40), text_of(record))
        np.testing.assert_array_equal(made["decoder_tokens"], [START, *made["labels"][:-1]])


def test_denoising_gives_the_text_back(windows, rng_seed):
    noise = denoising.bart(MASK, stops=[17])
    for index, record in enumerate(windows):
        made = examples.denoised(record, generator(rng_seed, 0, index), noise=noise, end=0, start=START)
        text = text_of(record)[: LENGTH - 1]
        inputs, targets = made["tokens"][made["segments"] > 0], made["labels"][made["weights"] > 0]
        assert targets.tolist() == [*text, 0] and inputs[-1] == 0 and MASK in inputs
        expected = noise(text, generator(rng_seed, 0, index))[: LENGTH - 1]
        assert inputs[:-1].tolist() == expected.tolist()
        np.testing.assert_array_equal(made["decoder_tokens"], [START, *made["labels"][:-1]])


def test_a_continuation_follows_its_source(windows):
    for record in windows:
        made = examples.continued(record, generator(0, 0, 0), start=START)
        source, target = made["tokens"][made["segments"] > 0], made["labels"][made["weights"] > 0]
        assert [*source, *target] == text_of(record).tolist()
        assert len(made["tokens"]) == LENGTH // 2 and len(made["labels"]) == LENGTH - LENGTH // 2


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_pairs_are_sentences_of_the_corpus(prepared, kind, rng_seed):
    own = {"kind": kind, "cls": CLS, "sep": SEP, "seed": rng_seed}
    pairs = paired(replace(prepared, example=hidden(prepared, 0.0)), **own)
    texts, source = "".join(documents_of(7)), pairs.source("train")
    assert len(source) > 20
    labels = set()
    for record in source:
        tokens, real = record["tokens"][:-1], record["segments"][:-1] > 0
        first_end, second_end = np.flatnonzero((tokens == SEP) & real)
        assert tokens[0] == CLS and second_end == real.sum() - 1
        assert record["token_types"][: first_end + 1].sum() == 0
        assert record["token_types"][first_end + 1 : second_end + 1].all()
        for part in (tokens[1:first_end], tokens[first_end + 1 : second_end]):
            assert pairs.tokenizer.decode(part) in texts
        labels.add(record["pair_labels"])
    assert labels == {0, 1}
    batch = next(pipeline.TrainIterator(pairs, 4, rng_seed))
    assert batch["pair_labels"].shape == (4,) and batch["token_types"].shape == (4, LENGTH)
    with pytest.raises(ConfigError, match="did you mean 'validation'"):
        pairs.source("vaildation")


def test_consecutive_batches_go_on_row_by_row(prepared, rng_seed):
    count = len(prepared.source("train"))
    prepared = replace(prepared, example=partial(examples.next_window, end=prepared.tokenizer.end_of_text))
    batches = pipeline.TrainIterator(prepared, 4, rng_seed, order="consecutive")
    before, seen = next(batches), []
    for _ in range(count // 4 - 1):
        after = next(batches)
        whole = (before["weights"] > 0).all(axis=1)  # the text's last window has none behind it
        np.testing.assert_array_equal(before["labels"][whole, -1], after["tokens"][whole, 0])
        np.testing.assert_array_equal(after["opens"], after["tokens"][:, 0] == prepared.tokenizer.end_of_text)
        seen += [row.tobytes() for row in before["tokens"]]
        before = after
    assert len(set(seen)) == len(seen)
    hosts = [
        pipeline.TrainIterator(prepared, 4, rng_seed, 3, order="consecutive", process_index=host, process_count=2)
        for host in (0, 1)
    ]
    whole = next(pipeline.TrainIterator(prepared, 4, rng_seed, 3, order="consecutive"))
    for host, part in enumerate(map(next, hosts)):
        np.testing.assert_array_equal(part["tokens"], whole["tokens"][host::2])
