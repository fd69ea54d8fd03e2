"""A corpus mixed with tasks: how often each part is drawn, in which order it is read, what its examples say."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from documents import LENGTH
from draws import BAR, standard_errors

from xylem.data import examples, mixture, pipeline, spans
from xylem.data.mixture import mixed
from xylem.errors import ConfigError

SIZES, LIMIT = {"few": 7, "many words": 300, "some": 45}, 60  # "many words" and the corpus are above the limit
END, START, VOCAB, SENTINELS = 0, 311, 360, 40


def texts_of(name: str, size: int) -> list[dict]:
    return [{"input": f"{name} {i} über\n☃", "target": f"answer {3 * i}"} for i in range(size)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, size in SIZES.items():
        lines = [json.dumps(one) + "\n" for one in texts_of(name, size)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))  # blank lines between them
    return {name: str(folder / f"{name}.jsonl") for name in SIZES}


def made_by(sizes: tuple[int, int], target_length: int = 0):
    """What an example becomes, and the sizes of its source and its target."""
    settings = {"vocab_size": VOCAB, "noise_density": 0.2, "mean_span": 2.5, "sentinels": SENTINELS}
    sides = {"end": END, "start": START}
    window = partial(examples.corrupted_spans, **settings, **sides, target_length=target_length)
    return partial(examples.mixed, window=window, task=partial(examples.text_to_text, sizes=sizes, **sides))


@pytest.fixture(scope="module")
def parts(prepared, tasks) -> mixture.Mixture:
    source, _ = spans.sizes(LENGTH, 0.2, 2.5)
    return mixed(replace(prepared, example=made_by((source, 20), 20)), tasks, LIMIT)


def part_of(parts: mixture.Mixture, row: int) -> int:
    """0 for the corpus, then the tasks."""
    bounds = np.cumsum([parts.counts["train"]["windows"], *SIZES.values()])
    return int(np.searchsorted(bounds, row, side="right"))


def test_parts_are_drawn_in_proportion_to_their_examples_up_to_the_limit(parts, rng_seed, proof):
    windows, places = parts.counts["train"]["windows"], 6000
    assert windows > LIMIT
    capped = np.array([LIMIT, 7, LIMIT, 45])
    at = parts.order(rng_seed)
    drawn = [part_of(parts, at(place)[0]) for place in range(places)]
    counts = np.bincount(drawn, minlength=4)
    free = np.array([windows, *SIZES.values()])
    assert standard_errors(counts, free / free.sum()) > BAR
    after = Counter(pairwise(drawn))  # each draw is independent of the one before
    pairs = [after[one, other] for one in (0, 2, 3) for other in (0, 2, 3)]
    rates = capped / capped.sum()
    joint = [rates[one] * rates[other] for one in (0, 2, 3) for other in (0, 2, 3)]
    assert np.max(np.abs(np.array(pairs) / places - joint) / np.sqrt(np.array(joint) / places)) < BAR
    row = "T5 mixture: how often each part is drawn"
    error = standard_errors(counts, rates)
    proof(row, "min(examples, K) / sum (3.5.2), standard errors", error, BAR, rng_seed, "no limit")


def test_each_part_is_read_in_fresh_permutations(parts, rng_seed, monkeypatch):
    monkeypatch.setattr(mixture, "_BLOCK", 500)  # several blocks of draws
    at, read = parts.order(rng_seed), {0: [], 1: [], 2: [], 3: []}
    for place in range(3000):
        row, epoch = at(place)
        read[part_of(parts, row)].append((epoch, row))
    for part, size in enumerate([parts.counts["train"]["windows"], *SIZES.values()]):
        epochs = len(read[part]) // size
        assert [epoch for epoch, _ in read[part]] == [turn // size for turn in range(len(read[part]))]
        orders = [tuple(row for _, row in read[part][size * e : size * (e + 1)]) for e in range(epochs)]
        assert epochs >= 2 and all(sorted(order) == sorted(orders[0]) for order in orders)
        assert len(set(orders[0])) == size and len(set(orders)) > 1
    packed = parts.order(rng_seed + 1)
    assert [at(place) for place in range(20)] != [packed(place) for place in range(20)]


def test_a_place_is_known_without_those_before_it(parts, rng_seed):
    walked = parts.order(rng_seed)
    found = [walked(place) for place in range(4200)]
    for place in (4199, 0, 4095, 4096):
        assert parts.order(rng_seed)(place) == found[place]


def test_an_example_says_its_task_and_its_text(parts):
    expected = {f"{name}: {one['input']}": one["target"] for name in SIZES for one in texts_of(name, SIZES[name])}
    make, source, said = made_by((60, 20)), parts.source("train"), {}
    for row in range(parts.counts["train"]["windows"], len(source)):
        made = make(source.__getitems__([row])[0], np.random.default_rng(0))
        inputs, targets = made["tokens"][made["segments"] > 0], made["labels"][made["weights"] > 0]
        assert inputs[-1] == targets[-1] == END
        np.testing.assert_array_equal(made["decoder_tokens"], [START, *made["labels"][:-1]])
        said[parts.tokenizer.decode(inputs[:-1])] = parts.tokenizer.decode(targets[:-1])
    assert said == expected


def test_what_is_longer_than_its_place_ends_all_the_same(parts):
    record = {"tokens": np.arange(5, 14, dtype=np.int32), "targets": np.arange(20, 24, dtype=np.int32)}
    cut, fits = (made_by(sizes)(record, np.random.default_rng(0)) for sizes in ((6, 3), (10, 5)))
    assert cut["tokens"].tolist() == [5, 6, 7, 8, 9, END] and cut["labels"].tolist() == [20, 21, END]
    assert fits["tokens"].tolist() == [*range(5, 14), END] and fits["labels"].tolist() == [20, 21, 22, 23, END]
    assert all((made[name] == 1).all() for made in (cut, fits) for name in ("segments", "weights"))


def test_batches_hold_both_kinds_and_go_on_on_any_number_of_hosts(parts, rng_seed):
    whole = pipeline.TrainIterator(parts, 10, rng_seed)
    batches = [next(whole) for _ in range(12)]
    sizes = spans.sizes(LENGTH, 0.2, 2.5)
    assert all(batch["tokens"].shape == (10, sizes[0]) for batch in batches)
    assert all(batch["labels"].shape == (10, 20) for batch in batches)
    sentinels = [(batch["labels"] >= VOCAB - SENTINELS).any(axis=1) for batch in batches]
    assert 0 < np.concatenate(sentinels).sum() < 120
    hosts = [pipeline.TrainIterator(parts, 10, rng_seed, process_index=h, process_count=2) for h in (0, 1)]
    for host, iterator in enumerate(hosts):
        iterator.set_state(json.loads(json.dumps(pipeline.TrainIterator(parts, 10, rng_seed, 7).get_state())))
        for batch in batches[7:]:
            local = next(iterator)
            for name, x in batch.items():
                np.testing.assert_array_equal(local[name], x[host::2])


def test_validation_is_of_the_corpus(parts, prepared):
    windows = sum(batch["weights"].any(axis=1).sum() for batch in pipeline.eval_batches(parts, "validation", 4))
    assert windows == prepared.counts["validation"]["windows"]


def test_a_mixture_of_other_examples_is_another_order(prepared, parts, tasks, tmp_path):
    state = pipeline.TrainIterator(parts, 4, 0).get_state()
    (tmp_path / "few.jsonl").write_text(json.dumps({"input": "a", "target": "b"}))
    for changed, limit in ((tasks | {"few": str(tmp_path / "few.jsonl")}, LIMIT), (tasks, LIMIT + 1)):
        other = mixed(replace(prepared, example=parts.example), changed, limit)
        with pytest.raises(ConfigError, match=r"dataset: .* its order is another"):
            pipeline.TrainIterator(other, 4, 0).set_state(state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "{file}' is not possible; a file that can be read"),
        ("", "{file}' is not possible; a file with at least one line of"),
        ('{"input": "a", "target": "b"}\n{"input": "a"', "{file}, line 2' is not possible; each line of a .jsonl"),
        ('\n["a", "b"]', "{file}, line 2' is not possible; each line of a .jsonl file is a JSON object"),
        ('{"input": "a", "targets": "b"}', '{file}, line 1\' is not possible; its "target" is a text'),
        ('{"input": 3, "target": "b"}', '{file}, line 1\' is not possible; its "input" is a text'),
        ('{"input": "", "target": "b"}', '{file}, line 1\' is not possible; its "input" is a text that is not empty'),
        ('{"input": "a", "target": "\\ud800"}', "{file}, line 1' is not possible; its text is not Unicode"),
    ],
)
def test_a_task_that_cannot_be_read_is_named(text, message, prepared, tmp_path):
    file = tmp_path / "a.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        mixed(prepared, {"sst": str(file)}, 9)
    assert str(caught.value).startswith("objective.tasks.sst: '" + message.format(file=file)), caught.value
