"""Whole runs on a small text: what they leave, that they repeat, stop, go on and give up as promised."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xylem import models
from xylem.data import pipeline
from xylem.data.config import DataConfig
from xylem.errors import ConfigError, NonFiniteError
from xylem.models.llama import llama
from xylem.models.settings import Compute
from xylem.training import program
from xylem.training.checkpoint import load_params
from xylem.training.config import MeshConfig, OptimizerConfig, RunConfig
from xylem.training.loop import pretrain
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm
from xylem.training.step import eval_step

STEPS = 8
ONE = MeshConfig(data=1)
MODEL = replace(
    llama(2, 16, 4, 2, 22, 264, 32, rope_theta=777.0, norm_eps=1e-4, head="tied"),
    dropout=0.1,
    compute=Compute(layers="scan", kernels="plain"),
)


def write_corpus(folder: Path) -> Path:
    """Some 15 KB of sentences in which the next word is not always the same."""
    rng = np.random.default_rng(11)
    words = ["a", "tree", "grows", "slowly", "in", "the", "shade", "while", "roots", "drink", "and", "leaves", "turn"]
    lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder / "text.txt"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> RunConfig:
    """A run that takes a second once its programs are compiled; all runs here share the cache of data and programs."""
    folder = tmp_path_factory.mktemp("loop")
    data = DataConfig(str(write_corpus(folder)), tokenizer="bytes", sequence_length=16, cache_dir=str(folder / "cache"))
    return RunConfig(
        model=MODEL,
        data=data,
        optimizer=OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=2),
        mesh=ONE,
        steps=STEPS,
        batch_size=8,
        ema=0.8,
        log_every=1,
        evaluate_every=2,
        evaluate_batches=3,
        save_every=3,
        sample_every=5,
        sample_prompt="a tree",
        keep=1,
        run_dir=str(folder / "unbroken"),
    )


@pytest.fixture(scope="module")
def finished(base) -> dict:
    """The summary of the unbroken run."""
    return pretrain(base, ["pretrain.py", "--here"])


@pytest.fixture(scope="module")
def halfway(base, tmp_path_factory) -> RunConfig:
    """The same run, ended after half of its steps."""
    config = replace(base, steps=STEPS // 2, run_dir=str(tmp_path_factory.mktemp("half") / "run"))
    pretrain(config)
    return config


def rows(folder: str) -> list[dict]:
    """The logged steps."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: str, key: str = "loss") -> dict[int, float]:
    return {row["step"]: row[key] for row in rows(folder) if key in row}


def checksum(folder: str) -> str:
    """SHA-256 of everything learned in the newest checkpoint: parameters, optimizer, average."""
    found = hashlib.sha256()
    for entry in ("trainable", "optimizer", "ema"):
        for path, array in jax.tree_util.tree_leaves_with_path(load_params(folder, entries=(entry,))[0]):
            found.update(jax.tree_util.keystr(path).encode() + np.asarray(array).tobytes())
    return found.hexdigest()


def validation_loss(config: RunConfig, entry: str, limit: int | None = None) -> float:
    """Mean loss over the whole validation split, or its first batches, computed apart from the loop."""
    data, module = pipeline.prepare(config.data), models.build(config.model)
    params, _ = load_params(config.run_dir, entries=(entry,))
    step = jax.jit(partial(eval_step, loss=partial(causal_lm, module, ObjectiveConfig())))
    batches = itertools.islice(pipeline.eval_batches(data, "validation", 8), limit)
    sums = [step(params, jax.tree.map(jnp.asarray, b)) for b in batches]
    return sum(float(s.nll) for s in sums) / sum(float(s.weight) for s in sums)


def test_run_leaves_everything_it_promises(base, finished):
    folder = Path(base.run_dir)
    logged = rows(base.run_dir)
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    assert all({"loss", "nll", "tokens_per_second", "gradient_norm", "learning_rate"} <= row.keys() for row in logged)
    assert [row["step"] for row in logged if "validation_loss" in row] == [2, 4, 6, 8]
    whole = {name: figure for name, figure in finished.items() if name.startswith("validation_")}
    assert len(whole) == 3 and whole.items() <= logged[-1].items(), "the curve ends at the whole split's figures"
    assert logged[-1]["loss"] < logged[0]["loss"]
    np.testing.assert_allclose([row["learning_rate"] for row in logged], [0.05, *[0.1] * 7], rtol=1e-6)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(finished))
    wanted = {"step", "validation_loss", "validation_perplexity", "validation_bits_per_byte", "sample"}
    assert wanted <= finished.keys()
    assert finished["sample"].startswith("a tree") and (folder / "sample.txt").read_text().startswith("a tree")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["optimizer"]["learning_rate"] == 0.1
    assert "jax" in json.loads((folder / "versions.json").read_text())["packages"]
    assert json.loads((folder / "starts.jsonl").read_text())["argv"] == ["pretrain.py", "--here"]
    assert any(folder.joinpath("tensorboard").iterdir())
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    assert (folder / "checkpoints" / f"{STEPS:08d}" / "COMPLETE").exists()


def test_run_evaluates_the_averaged_weights_over_the_whole_split(base, finished):
    np.testing.assert_allclose(finished["validation_loss"], validation_loss(base, "ema"), rtol=1e-5)
    assert abs(finished["validation_loss"] - validation_loss(base, "trainable")) > 1e-4
    expected = np.exp(finished["validation_loss"])
    np.testing.assert_allclose(finished["validation_perplexity"], expected, rtol=1e-6)


def test_run_keeps_its_best_checkpoint_and_the_last(base, finished):
    validations = losses(base.run_dir, "validation_loss")
    # Like is compared with like: the last step's figure is of the whole split, the others of the first batches.
    validations[STEPS], whole = validation_loss(base, "ema", base.evaluate_batches), validations[STEPS]
    assert abs(whole / validations[STEPS] - 1) > 1e-3
    best = min(validations, key=lambda step: (validations[step], step))
    manifests = {
        int(path.parent.name): json.loads(path.read_text())
        for path in Path(base.run_dir, "checkpoints").glob("0*/manifest.json")
    }
    assert set(manifests) == {best, STEPS}
    assert manifests[best]["best"]
    assert manifests[STEPS]["metadata"]["best_validation"] == pytest.approx(validations[best])
    assert manifests[STEPS]["metadata"]["tokenizer_hash"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(base, finished, tmp_path):
    again = replace(base, run_dir=str(tmp_path / "again"))
    other = replace(base, run_dir=str(tmp_path / "other"), seed=1, steps=1)
    assert pretrain(again)["validation_loss"] == finished["validation_loss"]
    assert losses(again.run_dir) == losses(base.run_dir)
    assert checksum(again.run_dir) == checksum(base.run_dir)
    pretrain(other)
    assert losses(other.run_dir)[1] != losses(base.run_dir)[1]


def test_run_reads_the_validation_split_once_at_its_end(base, tmp_path, monkeypatch):
    read, batches_of = [], pipeline.eval_batches

    def counted(*args, **options):
        for batch in batches_of(*args, **options):
            read.append(batch["weights"].sum())
            yield batch

    monkeypatch.setattr(pipeline, "eval_batches", counted)
    config = replace(base, steps=1, evaluate_batches=3, run_dir=str(tmp_path / "run"))
    for _ in range(2):  # called again, the finished run reads it again: nothing keeps its figures
        read.clear()
        pretrain(config)
        assert sum(read) == pipeline.prepare(base.data).counts["validation"]["tokens"] - 1
        assert len(read) > config.evaluate_batches


def test_stopped_and_resumed_run_gives_the_bits_of_the_unbroken_one(base, finished, halfway, tmp_path):
    copy = copytree(halfway.run_dir, tmp_path / "run")
    resumed = pretrain(replace(base, run_dir=str(copy)))
    assert losses(copy) == losses(base.run_dir)
    assert checksum(copy) == checksum(base.run_dir)
    ours, theirs = losses(copy, "validation_loss"), losses(base.run_dir, "validation_loss")
    assert ours.pop(halfway.steps) != theirs.pop(halfway.steps), "the whole split was read where the run once ended"
    assert ours == theirs
    assert resumed["validation_loss"] == finished["validation_loss"]


def test_run_resumed_on_another_mesh_gives_the_same_losses(base, finished, halfway, tmp_path):
    copy = copytree(halfway.run_dir, tmp_path / "run")
    pretrain(replace(base, run_dir=str(copy), mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    expected = losses(base.run_dir)
    for step, loss in losses(copy).items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step
    assert len(losses(copy)) == STEPS


def test_finished_run_called_again_says_so_and_trains_nothing(base, finished, halfway, tmp_path, capsys):
    copy = copytree(halfway.run_dir, tmp_path / "run")
    before = checksum(copy), rows(copy), sorted(p.name for p in (copy / "checkpoints").iterdir())
    summary = pretrain(replace(halfway, run_dir=str(copy)))
    assert (checksum(copy), rows(copy), sorted(p.name for p in (copy / "checkpoints").iterdir())) == before
    assert summary["step"] == halfway.steps
    assert "already done" in capsys.readouterr().out


def test_run_begun_before_a_field_existed_goes_on_with_the_fields_default(base, finished, halfway, tmp_path, capsys):
    copy = copytree(halfway.run_dir, tmp_path / "run")
    settings = json.loads((copy / "config.json").read_text())
    del settings["ramp"], settings["objective"]["z_loss"]
    (copy / "config.json").write_text(json.dumps(settings))
    pretrain(replace(halfway, run_dir=str(copy)))
    assert "already done" in capsys.readouterr().out
    (copy / "config.json").write_text(json.dumps({**settings, "batches": 3}))
    with pytest.raises(ConfigError, match=r"batches: there 3, now '\(absent\)'"):
        pretrain(replace(halfway, run_dir=str(copy)))


def test_run_whose_tokenizer_is_larger_than_the_vocabulary_is_refused(base, tmp_path):
    small = replace(base, model=replace(MODEL, vocab_size=200), run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"model.vocab_size: 200 .* the tokenizer bytes has 257 tokens"):
        pretrain(small)


@pytest.mark.parametrize(
    ("prompt", "said"), [("x" * 31, "between 1 and 30 tokens; it has 31"), ("", "between 1 and 30 tokens; it has 0")]
)
def test_run_with_an_impossible_sample_prompt_is_refused_before_its_state_is_made(
    prompt, said, base, tmp_path, monkeypatch
):
    def never(*_):
        raise AssertionError("the state was made")

    monkeypatch.setattr(program, "make_state", never)
    with pytest.raises(ConfigError, match=f"sample_prompt: '{prompt}' is not possible; {said}"):
        pretrain(replace(base, sample_prompt=prompt, run_dir=str(tmp_path / "run")))


def test_run_whose_batch_the_mesh_does_not_divide_is_refused_and_leaves_nothing(base, tmp_path):
    odd = replace(base, batch_size=6, mesh=MeshConfig(data=2, fsdp=2), run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"batch_size: 6 is not possible; mesh.data x mesh.fsdp x accumulate = 4"):
        pretrain(odd)
    assert not (tmp_path / "run").exists()


def test_run_that_is_not_finite_gives_up_and_keeps_its_last_good_checkpoint(base, tmp_path):
    config = replace(base, run_dir=str(tmp_path / "run"), save_every=1, steps=20, ema=None, evaluate_every=0)
    wild = replace(config, optimizer=replace(base.optimizer, learning_rate=1e30))
    with pytest.raises(NonFiniteError, match=r"step 4: .*3 steps in a row were not finite"):
        pretrain(wild)
    saved = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("0*"))
    params, metadata = load_params(wild.run_dir)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(params))
    assert metadata["config"]["steps"] == 20
    bad = [row["step"] for row in rows(wild.run_dir) if row["gradient_norm"] is None]
    assert bad and saved[-1] < bad[0], "nothing is saved from the first bad step on"


def script(*flags: str, cache: Path, corpus: Path) -> list[str]:
    """The command of a small run of ``scripts/pretrain.py``."""
    root = Path(__file__).parents[2]
    sizes = {"vocab-size": 264, "num-layers": 1, "d-model": 32, "d-ff": 44, "max-length": 32}
    model = itertools.chain.from_iterable((f"--model.{name}", str(value)) for name, value in sizes.items())
    data = ("--data.corpus", str(corpus), "--data.tokenizer", "bytes", "--data.sequence-length", "16")
    watch = ("--log-every", "1", "--evaluate-every", "0", "--sample-every", "0", "--save-every", "0")
    optimizer = ("--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0", "--data.cache-dir", str(cache))
    heads = ("--model.num-heads", "4", "--model.num-kv-heads", "2", "--model.head-dim", "8")
    return [sys.executable, str(root / "scripts" / "pretrain.py"), *model, *heads, *data, *watch, *optimizer, *flags]


@pytest.mark.slow
def test_terminated_run_saves_and_goes_on_to_the_same_bits(tmp_path):
    command = partial(script, cache=tmp_path / "cache", corpus=write_corpus(tmp_path))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    run = partial(subprocess.run, env=environment, check=True, capture_output=True, timeout=300)
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    with subprocess.Popen(command("--run-dir", str(broken), "--steps", "100000"), env=environment) as process:
        end = time.monotonic() + 200
        while not ((broken / "metrics.jsonl").exists() and len(rows(broken)) > 5):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "a run that was asked to stop ends well"
        assert time.monotonic() - asked < 30
    (saved,) = [int(path.name) for path in (broken / "checkpoints").glob("0*")]
    assert saved == max(losses(broken))
    steps = str(saved + 20)
    run(command("--run-dir", str(broken), "--steps", steps))
    run(command("--run-dir", str(unbroken), "--steps", steps))
    assert losses(broken) == losses(unbroken)
    whole = lambda folder: [  # noqa: E731
        np.asarray(x).tobytes() for x in jax.tree.leaves(load_params(folder, entries=("trainable",))[0])
    ]
    assert whole(broken) == whole(unbroken)
