"""Two processes that find each other through the environment train as one: what happens on each host of a pod."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from xylem.errors import ConfigError
from xylem.sharding import join_hosts

BAR = 1e-5
SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"
TINY = (
    *("--model.num-layers", "2", "--model.d-model", "16", "--model.num-heads", "2", "--model.num-kv-heads", "2"),
    *("--model.head-dim", "8", "--model.d-ff", "24", "--model.vocab-size", "258", "--model.max-length", "32"),
    *("--data.tokenizer", "bytes", "--data.sequence-length", "16", "--batch-size", "8", "--log-every", "1"),
    *("--evaluate-every", "2", "--save-every", "2", "--optimizer.name", "adamw", "--optimizer.learning-rate", "1e-3"),
    *("--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0"),  # the same whatever --steps is
)
HONEST = (str(SCRIPT),)
# The same script on a host that reads the rows of the first one, whichever it is.
FAULTY = (
    "-c",
    f"""
import runpy, sys
from xylem.data import pipeline

class FirstRows(pipeline.TrainIterator):
    def __init__(self, *args, process_index, **options):
        super().__init__(*args, process_index=0, **options)

pipeline.TrainIterator = FirstRows
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""",
)


def start(
    folder: Path, run: str, steps: int, *flags: str, program: tuple[str, ...] = HONEST, **environment: str
) -> subprocess.Popen:
    where = ("--data.corpus", str(folder / "text.txt"), "--data.cache-dir", str(folder / "cache"))
    command = [sys.executable, *program, *TINY, *where, "--run-dir", str(folder / run), "--steps", str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *flags], env={**os.environ, "XLA_FLAGS": "", **environment}, **pipes)


def two_hosts(
    folder: Path, run: str, steps: int, *flags: str, program: tuple[str, ...] = HONEST
) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    host = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(folder, run, steps, *flags, program=program, **host, JAX_PROCESS_ID=str(i)) for i in range(2)]


def ended_well(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def rows(folder: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_two_hosts_train_resume_and_validate_as_one(tmp_path, proof, rng_seed):
    """fsdp over two processes of one device, stopped after 2 of 4 steps, against one process with one device."""
    words = np.random.default_rng(rng_seed).integers(0, 26, (400, 5)) + ord("a")
    (tmp_path / "text.txt").write_text(" ".join(bytes(word.tolist()).decode() for word in words))
    alone = start(tmp_path, "alone", 4)
    output = alone.communicate(timeout=240)[0]
    assert alone.returncode == 0, output
    ended_well(two_hosts(tmp_path, "hosts", 2, "--mesh.fsdp", "2"))
    first, _ = ended_well(two_hosts(tmp_path, "hosts", 4, "--mesh.fsdp", "2"))
    assert "step 4/4" in first and "going on from step 2" in first

    ended_well(two_hosts(tmp_path, "faulty", 2, "--mesh.fsdp", "2", program=FAULTY))
    names = ("loss", "gradient_norm", "validation_loss")
    logged = {
        run: [[row[name] for name in names if name in row] for row in rows(tmp_path, run)]
        for run in ("alone", "hosts", "faulty")
    }
    assert [len(row) for row in logged["hosts"]] == [len(row) for row in logged["alone"]] == [2, 3, 2, 3]

    def apart(run: str) -> float:
        ours = np.concatenate(logged[run])
        return float(np.abs(ours / np.concatenate(logged["alone"])[: len(ours)] - 1).max())

    assert apart("faulty") > BAR
    mutation = "the second host reads the rows of the first"
    proof("two hosts: loss, gradient norm, validation, resumed", "one process", apart("hosts"), BAR, rng_seed, mutation)


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_two_hosts_read_a_growing_batch_as_one(tmp_path, rng_seed):
    words = np.random.default_rng(rng_seed).integers(0, 26, (400, 5)) + ord("a")
    (tmp_path / "text.txt").write_text(" ".join(bytes(word.tolist()).decode() for word in words))
    ramp = ("--accumulate", "2", "--ramp.tokens", "100", "--evaluate-every", "0")
    ended_well([start(tmp_path, "alone", 4, *ramp)])
    ended_well(two_hosts(tmp_path, "hosts", 4, *ramp, "--mesh.fsdp", "2"))
    alone, hosts = rows(tmp_path, "alone"), rows(tmp_path, "hosts")
    assert [row["tokens"] for row in hosts] == [row["tokens"] for row in alone] == [64, 128, 256, 384]
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose([row[name] for row in hosts], [row[name] for row in alone], rtol=BAR)


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_signal_to_one_host_stops_both_at_the_same_step_and_saves(tmp_path):
    (tmp_path / "text.txt").write_text("Pack my box with five dozen liquor jugs. " * 200)
    processes = two_hosts(tmp_path, "run", 100_000, "--evaluate-every", "0", "--save-every", "0")
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    outputs = ended_well(processes)
    assert "stopped at step" in outputs[0]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (saved / "COMPLETE").is_file() and int(saved.name) == rows(tmp_path, "run")[-1]["step"]


def test_hosts_numbers_that_are_none_are_named(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES: 'two'"):
        join_hosts()
