"""Runs of T5 on a corpus and tasks: told, planned, resumed, and learning what only the tasks say."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xylem.data import pipeline
from xylem.errors import ConfigError
from xylem.sharding import make_mesh
from xylem.training.checkpoint import load_params
from xylem.training.inputs import example_shapes, objective_data
from xylem.training.loop import pretrain
from xylem.training.objective_config import SpanConfig
from xylem.training.objectives import causal_lm
from xylem.training.program import assemble

WORDS = {"up": "down", "sap": "wood"}


@pytest.fixture(scope="module")
def mixing(folder) -> SpanConfig:
    lines = [json.dumps({"input": word, "target": answer}) + "\n" for word, answer in WORDS.items()]
    (folder / "words.jsonl").write_text("".join(lines * 40))
    (folder / "long.jsonl").write_text(json.dumps({"input": "a tree of many words", "target": "b" * 30}))
    tasks = {"say": str(folder / "words.jsonl"), "long one": str(folder / "long.jsonl")}
    return SpanConfig(sentinels=9, tasks=tasks, mixing_limit=60, target_length=8)


@pytest.mark.slow
def test_a_mixed_run_goes_on_bit_for_bit_and_learns_its_task(run_of, mixing, capsys):
    unbroken = run_of("t5", "mixed", objective=mixing, steps=40, batch_size=8, evaluate_every=0, save_every=20)
    summary = pretrain(unbroken)
    said = capsys.readouterr().out
    assert "mixed of 49.6% a, 49.6% say, 0.8% long one" in said
    assert "long one: 1 of 1 tokens are cut to 16" in said and "long one: 1 of 1 targets are cut to 8" in said
    assert "say: " not in said
    pretrain(replace(unbroken, steps=20, run_dir=unbroken.run_dir + "-halves"))
    resumed = replace(unbroken, run_dir=unbroken.run_dir + "-halves")
    assert pretrain(resumed)["validation_loss"] == summary["validation_loss"]
    (first, _), (second, _) = (load_params(run.run_dir, entries=("trainable",)) for run in (unbroken, resumed))
    jax.tree.map(np.testing.assert_array_equal, first, second)

    alone = run_of("t5", "alone", objective=replace(mixing, tasks={}), steps=40, evaluate_every=0, save_every=0)
    pretrain(alone)
    other, _ = load_params(alone.run_dir, entries=("trainable",))
    data = objective_data(unbroken, pipeline.prepare(unbroken.data, lambda _: None))
    module = assemble(unbroken, make_mesh(data=1, devices=jax.devices()[:1])).module
    rows = [data.counts["train"]["windows"], data.counts["train"]["windows"] + 1]
    batch = jax.tree.map(jnp.asarray, data.batch(data.source("train"), rows))
    sums = [causal_lm(module, mixing, params, batch) for params in (first, other)]
    losses = [float(each.loss / each.weight) for each in sums]
    assert losses[0] < 0.7 * losses[1], losses


def test_shapes_of_a_mixture_are_known_before_there_is_a_text(run_of, mixing):
    config = run_of("t5", objective=mixing)
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    batch = next(pipeline.TrainIterator(data, 8, 0))
    assert example_shapes(config) == {name: (x.shape[1:], x.dtype) for name, x in batch.items()}
    assert batch["labels"].shape == (8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run_of: SpanConfig(mixing_limit=0), "objective.mixing_limit: 0"),
        (lambda run_of: SpanConfig(target_length=-1), "objective.target_length: -1"),
        (lambda run_of: SpanConfig(tasks={"": "a.jsonl"}), "objective.tasks: '' is not possible; a task has a name"),
        (lambda run_of: run_of("t5", objective=SpanConfig(target_length=33)), "max_length is 32"),
        (
            lambda run_of: pretrain(
                run_of("t5", "none", objective=SpanConfig(sentinels=9, tasks={"qa": "none.jsonl"}))
            ),
            "objective.tasks.qa: 'none.jsonl' is not possible; a file that can be read",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_named(run_of, change, message):
    with pytest.raises(ConfigError, match=message):
        change(run_of)
