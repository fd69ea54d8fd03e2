"""A sweep as a user meets it: shared, stopped and resumed, fitted, drawn, and every mistake named."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import jax
import pytest
from programs import script

from xylem.errors import ConfigError, NonFiniteError
from xylem.training import sweep
from xylem.training.loop import CHANGEABLE
from xylem.training.run_folder import open_run
from xylem.training.scaling import Law

LAW = Law(E=1.7, A=60.0, B=90.0, alpha=0.35, beta=0.3)
SIZES = ("16x1", "32x1", "48x2", "64x3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 80)
    return folder


@pytest.fixture
def flags(corpus, tmp_path):
    return (
        *("--data.corpus", str(corpus / "text.txt"), "--data.cache-dir", str(corpus / "cache")),
        *("--data.tokenizer", "bytes", "--model.vocab-size", "257", "--data.sequence-length", "16"),
        *("--run-dir", str(tmp_path / "sweep"), "--epochs", "1e9", "--samples", "5"),
    )


def invented(config, argv):
    """Stands in for ``pretrain``: the run's folder, its lock, and the loss that ``LAW`` says."""
    with open_run(config.run_dir, dataclasses.asdict(config), argv, changeable=CHANGEABLE) as folder:
        if (folder / "summary.json").exists():
            return {"step": config.steps, **json.loads((folder / "summary.json").read_text())}
        threading.Event().wait(0.01)
        tokens = config.steps * config.batch_size * config.data.sequence_length
        final = {"validation_loss": LAW(sweep.parameters(config.model), tokens)}
        (folder / "summary.json").write_text(json.dumps(final))
        invented.trained.append(folder.name)
    return {"step": config.steps, **final}


@pytest.fixture
def untrained(monkeypatch):
    """No run is really trained."""
    monkeypatch.setattr(invented, "trained", [], raising=False)
    monkeypatch.setattr(sweep, "pretrain", invented)
    monkeypatch.setattr(sweep, "LOOK_AGAIN", 0.01)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return invented.trained


def within(seconds, happened):
    """Wait until something has happened, however busy the machine is; no longer than some seconds."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture
def runs(corpus, tmp_path):
    import importlib

    from xylem.configs.pretrain import default

    script("scaling")
    base = importlib.import_module("script_scaling").quick(default()).run
    data = dataclasses.replace(
        base.data, corpus=str(corpus / "text.txt"), cache_dir=str(corpus / "cache"), tokenizer="bytes"
    )
    base = dataclasses.replace(base, data=data, run_dir=str(tmp_path / "sweep"))
    return sweep.planned(base, SIZES, (2e11, 2e12), epochs=1e9)


def test_scaling_runs_spend_their_budgets_on_models_of_their_sizes(runs):
    assert len(runs) == 8 and [run.name for run in runs[:2]] == ["16x1-2e+11", "32x1-2e+11"]
    for run in runs:
        model, config = run.config.model, run.config
        tokens, flops = config.steps * config.batch_size * config.data.sequence_length, 6 * run.N * run.D
        assert tokens == run.D and flops == pytest.approx(run.flops, rel=0.6 / config.steps)
        assert model.num_heads * model.head_dim == model.d_model and model.max_length == 128
        assert config.optimizer.warmup_steps == min(20, config.steps // 10)
        # Embedding (also the head), two norms a layer and one behind, and seven matrices a layer.
        layer = 4 * model.d_model**2 + 3 * model.d_model * model.d_ff + 2 * model.d_model
        count = (model.vocab_size + 1) * model.d_model + model.num_layers * layer
        assert count == run.N
    long = [run for run in runs if run.flops == 2e12 and run.N == runs[0].N]
    assert long[0].config.steps == pytest.approx(10 * runs[0].config.steps, rel=0.01)


def test_scaling_sweep_is_shared_by_all_who_join_and_each_run_is_trained_once(runs, untrained):
    others = [threading.Thread(target=sweep.train, args=(runs, (), lambda text: None)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert sorted(untrained) == sorted(run.name for run in runs)
    assert all(sweep.reached(run) == pytest.approx(LAW(run.N, run.D)) for run in runs)


def test_scaling_sweep_takes_over_the_run_of_a_process_that_died(runs, untrained):
    first = runs[0].config
    with open_run(first.run_dir, dataclasses.asdict(first), (), changeable=CHANGEABLE):
        other = threading.Thread(target=sweep.train, args=(runs[:2], (), lambda text: None))
        other.start()
        within(60, lambda: untrained)
        other.join(0.5)  # time enough to train the first, were it not held
        assert other.is_alive() and untrained == [runs[1].name]
    other.join(60)
    assert untrained == [runs[1].name, runs[0].name]


def test_scaling_sweep_that_was_stopped_goes_on_and_one_bad_run_is_left_out(runs, untrained, monkeypatch):
    def stopped(config, argv):
        return invented(config, argv) if config == runs[0].config else {"step": 1}

    monkeypatch.setattr(sweep, "pretrain", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep.train(runs, (), lambda text: None)
    assert untrained == [runs[0].name]

    def diverges(config, argv):
        if config == runs[3].config:
            raise NonFiniteError("step 7")
        return invented(config, argv)

    told = []
    monkeypatch.setattr(sweep, "pretrain", diverges)
    sweep.train(runs, (), told.append)
    assert sorted(untrained) == sorted(run.name for run in runs if run is not runs[3])
    assert sweep.reached(runs[3]) is None and any(f"{runs[3].name} is left out: step 7" in text for text in told)


def test_scaling_script_finds_the_law_behind_the_runs_and_draws_it(flags, tmp_path, untrained, capfd):
    ask = [*flags, "--sizes", *SIZES, "--flops", "1e10", "1e11", "1e12", "--budget", "1e15"]
    script("scaling")(ask)
    assert len(untrained) == 11, "the largest is too large for the smallest budget"
    found = json.loads((tmp_path / "sweep" / "scaling.json").read_text())
    assert found["law"] == pytest.approx(dataclasses.asdict(LAW), rel=1e-3)
    best = found["optimum"]
    assert 6 * best["N"] * best["D"] == pytest.approx(1e15)
    low, high = found["optimum_intervals"]["N"]
    assert low <= best["N"] * 1.01 and high >= best["N"] * 0.99 and high < 1.1 * low, "no noise: no doubt"
    assert [row["flops"] for row in found["isoflop"]] == [1e10, 1e11, 1e12]
    assert (tmp_path / "sweep" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    out = capfd.readouterr().out
    assert "compute-optimal at 1e+15" in out and f"{best['N']:.4g}" in out and "64x3-1e+11" in out

    (tmp_path / "sweep" / "scaling.png").unlink()
    (tmp_path / "sweep" / "16x1-1e+10" / "summary.json").unlink()
    script("scaling")([*ask, "--no-train", "--no-plot"])
    assert len(untrained) == 11 and not (tmp_path / "sweep" / "scaling.png").exists()
    assert len(json.loads((tmp_path / "sweep" / "scaling.json").read_text())["runs"]) == 10
    with pytest.raises(ConfigError, match="it holds a run with another optimizer"):
        script("scaling")([*ask, "--optimizer.learning-rate", "0.5"])


@pytest.mark.slow
def test_scaling_script_really_trains(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "SHORTEST", 1)
    ask = [*flags, "--sizes", "16x1", "--flops", "2e7", "--batch-size", "8", "--model.compute.layers", "scan"]
    with pytest.raises(ConfigError, match="runs: 1 is not possible"):
        script("scaling")(ask)
    (folder,) = (path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert rows[-1]["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-3)
    monkeypatch.setattr(sweep, "pretrain", None)
    with pytest.raises(ConfigError, match="runs: 1 is not possible"):
        script("scaling")(ask)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bert"], "PRESET: 'bert'"),
        (["lstm"], "PRESET: 'recurrent'"),
        (["--sizes", "16by2"], "sizes: '16by2'"),
        (["--sizes", "17x2"], "sizes: '17x2'"),
        (["--sizes", "16x0"], "sizes: '16x0'"),
        (["--flops", "-1"], "flops: -1.0"),
        (["--flops", "1e3"], "no run has between 150 steps"),
        (["--epochs", "0.1"], "0.1 epochs"),
        (["--budget", "0"], "budget: 0.0"),
        (["--level", "1"], "level: 1.0"),
        (["--samples", "0"], "samples: 0"),
    ],
)
def test_scaling_mistakes_are_named_before_anything_is_trained(flags, tmp_path, untrained, arguments, said):
    named = arguments[:1] if not arguments[0].startswith("-") else []
    with pytest.raises(ConfigError) as caught:
        script("scaling")([*named, *flags, *arguments[len(named) :]])
    assert said in str(caught.value) and not Path(tmp_path / "sweep").exists() and not untrained
