"""Runs whose batch grows: what each step reads, one program for all sizes, resumed and sharded as plain ones."""

import json
from pathlib import Path
from shutil import copytree

import jax
import numpy as np
import pytest
from families import LENGTH

from xylem.data import pipeline
from xylem.errors import ConfigError
from xylem.sharding import make_mesh
from xylem.training import report
from xylem.training.checkpoint import load_params
from xylem.training.config import MeshConfig, RampConfig
from xylem.training.inputs import objective_data
from xylem.training.loop import pretrain
from xylem.training.program import assemble
from xylem.training.state import make_state
from xylem.training.sweep import planned

STEPS, ROWS = 8, 4  # steps of a run, rows of a micro-batch
SIZES = [1, 1, 1, 1, 2, 2, 3, 4]  # 1 + floor(3 read / 10), until 10 have been read


@pytest.fixture
def grown(run_of):
    """``grown(name, **changes)``: a run of ``STEPS`` steps whose batch grows from 1 to 4 micro-batches."""

    def grown(name: str, **changes):
        ramp = {"ramp": RampConfig(tokens=10 * ROWS * LENGTH), "accumulate": 4, "batch_size": 4 * ROWS}
        often = {"steps": STEPS, "save_every": 4, "evaluate_every": 0}
        return run_of("gru", name, **ramp | often | changes)

    return grown


def logged(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def learned(config) -> list[bytes]:
    params, _ = load_params(config.run_dir, entries=("trainable", "optimizer"))
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]


def test_a_ramped_run_counts_its_tokens_goes_on_and_spreads(grown):
    unbroken = grown("unbroken")
    summary = pretrain(unbroken)
    rows = logged(unbroken)
    read = np.cumsum(SIZES) * ROWS * LENGTH
    assert [row["tokens"] for row in rows] == read.tolist()
    assert all(row["tokens_per_second"] > 0 for row in rows) and rows[-1]["eta_seconds"] == 0

    pretrain(grown("halves", steps=STEPS // 2))
    copy = Path(copytree(grown("halves").run_dir, Path(unbroken.run_dir).parents[1] / "spread"))
    resumed = grown("halves")
    assert pretrain(resumed)["validation_loss"] == summary["validation_loss"]
    assert learned(resumed) == learned(unbroken)
    assert [row["loss"] for row in logged(resumed)] == [row["loss"] for row in rows]

    spread = grown("spread", mesh=MeshConfig(data=2, fsdp=2), run_dir=str(copy))
    pretrain(spread)
    np.testing.assert_allclose([row["loss"] for row in logged(spread)], [row["loss"] for row in rows], rtol=1e-5)

    with pytest.raises(ConfigError, match=r"ramp.tokens: there 640, now 0"):
        pretrain(grown("halves", ramp=RampConfig()))


def test_all_sizes_are_one_program_and_the_steps_of_plain_runs(grown):
    """Steps of a ramped run against those that a plain run of their batch size would take."""
    config = grown("program")
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    program, compared = assemble(config, mesh), []
    state = make_state(program.create, program.abstract)
    batches = pipeline.TrainIterator(data, 4 * ROWS, config.seed, ramp=config.batch_ramp)
    stream = pipeline.TrainIterator(data, ROWS, config.seed)
    for step, size in enumerate(SIZES):
        rows = [next(stream) for _ in range(size)]
        before = jax.tree.map(np.copy, state)
        state, told = program.step(state, next(batches))
        if step not in (1, 6):
            continue
        alone = assemble(grown("plain", ramp=RampConfig(), accumulate=size, batch_size=size * ROWS), mesh)
        expected = alone.step(before, {name: np.concatenate([each[name] for each in rows]) for name in rows[0]})
        for ours, theirs in zip(jax.tree.leaves((state, told)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        compared.append(size)
    assert compared == [1, 3] and program.step._cache_size() == 1


def test_a_ramped_run_says_what_it_will_read(grown):
    config = grown("opening")
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    lines = report.opening(config, data, mesh, assemble(config, mesh).create(), None)
    epochs = sum(SIZES) * ROWS * LENGTH / data.counts["train"]["tokens"]
    assert any(f"8 steps of 64 to 256 are {epochs:.2f} epochs" in line for line in lines)
    plain = report.opening(grown("opening", ramp=RampConfig()), data, mesh, assemble(config, mesh).create(), None)
    assert any("8 steps of 256 are" in line for line in plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grown: RampConfig(tokens=-1), "ramp.tokens: -1"),
        (lambda grown: RampConfig(start=0), "ramp.start: 0"),
        (lambda grown: grown("x", ramp=RampConfig(tokens=9, start=4)), "ramp.start: 4 .* accumulate = 4"),
        (lambda grown: grown("x", accumulate=1), "ramp.start: 1 .* accumulate = 1"),
    ],
)
def test_ramps_that_cannot_be_are_named(grown, change, message):
    with pytest.raises(ConfigError, match=message):
        change(grown)


def test_a_sweep_has_batches_of_one_size(run_of):
    config = run_of("llama", accumulate=2, ramp=RampConfig(tokens=9))
    with pytest.raises(ConfigError, match=r"ramp.tokens: 9 .* the batches of a sweep have one size"):
        planned(config, ["32x1"], [1e12], 1.0)
