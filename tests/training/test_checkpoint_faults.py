"""Checkpoints are whole or not there, whatever happens to the process, the disk or the files."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import CONFIG, assert_equal, flip, make_state, payload, save, steps_in

from xylem.errors import CheckpointError
from xylem.training import checkpoint
from xylem.training.checkpoint import Checkpoints, restore


def truncate(folder):
    path = payload(folder, 20)
    os.truncate(path, path.stat().st_size - 1)
    return "were written"


def zero(folder):
    path = payload(folder, 20)
    path.write_bytes(bytes(path.stat().st_size))
    return "is damaged"


def delete(folder):
    payload(folder, 20).unlink()
    return "is missing"


def empty_step(folder):
    (folder / "00000030").mkdir()
    return "00000030: manifest.json is missing"


def no_marker(folder):
    (folder / "00000020" / "COMPLETE").unlink()
    return "COMPLETE is missing"


def flipped_manifest(folder):
    path = folder / "00000020" / "manifest.json"
    path.write_text(path.read_text().replace('"position": 140', '"position": 141'))
    return "manifest.json is damaged"


def swapped(folder):
    (folder / "00000020").rename(folder / "00000021")
    return "manifest.json is of step 20"


def other_shape(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(20, make_state(20, width=7), {}, CONFIG)
    return "trainable/layers/mlp/up/kernel: checkpoint (2, 24, 7), model (2, 24, 5)"


def other_dtype(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(20, make_state(20, dtype=jnp.bfloat16), {}, CONFIG)
    return "trainable/layers/mlp/up/kernel: checkpoint bfloat16, model float32"


def other_tree(folder):
    state = make_state(20)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(20, state.replace(frozen={"extra": jnp.ones(3)}), {}, CONFIG)
    return "frozen/extra: only in the checkpoint"


DAMAGES = [flip, truncate, zero, delete, empty_step, no_marker, flipped_manifest, swapped]
MISFITS = [other_shape, other_dtype, other_tree]


@pytest.mark.parametrize("damage", DAMAGES + MISFITS, ids=lambda damage: damage.__name__)
def test_checkpoint_damage_is_named_and_the_last_good_one_taken(tmp_path, damage):
    save(tmp_path, 10, *([] if damage is empty_step else [20]))
    reason = damage(tmp_path)
    found = restore(tmp_path, make_state(0))
    assert found.step == 10
    assert_equal(found.state, make_state(10))
    assert len(found.passed_over) == 1 and reason in found.passed_over[0], found.passed_over


def test_checkpoint_any_flipped_bit_is_found(tmp_path, proof, rng_seed, monkeypatch):
    """Random single-bit flips anywhere in a checkpoint whose array is large enough for a file of its own."""
    rng, flips = np.random.default_rng(rng_seed), 40
    state = {"params": jax.random.normal(jax.random.key(rng_seed), (100, 1001))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, state, {}, CONFIG)
    files = [path for path in (tmp_path / "00000020").rglob("*") if path.is_file()]

    def restored_in_silence(path) -> bool:
        good = path.read_bytes()
        body = bytearray(good)
        body[rng.integers(len(body))] ^= 1 << int(rng.integers(8))
        path.write_bytes(body)
        try:
            wrong = not np.array_equal(
                np.asarray(restore(tmp_path, state).state["params"]), np.asarray(state["params"])
            )
        except Exception as error:
            wrong = not isinstance(error, CheckpointError)
        path.write_bytes(good)
        return wrong

    missed = sum(restored_in_silence(files[rng.integers(len(files))]) for _ in range(flips))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "damage", lambda entry: None)
        trusting = sum(restored_in_silence(payload(tmp_path, 20)) for _ in range(8))
    assert trusting > 0
    mutation = f"sizes and hashes not compared: {trusting} of 8 flips in the largest file restored or crashed"
    row, oracle = "checkpoint: bit flips", f"{flips} random single-bit flips, share that was not refused"
    proof(row, oracle, missed / flips, 0.0, rng_seed, mutation)
    assert_equal(restore(tmp_path, state).state, state)


FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp
from xylem.errors import Failure
from xylem.training.checkpoint import Checkpoints

def state(step):
    return {"params": jax.random.normal(jax.random.key(step), (400, 1000))}

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def train(folder, then):
    with Checkpoints(folder) as checkpoints:
        yield checkpoints.save(1, state(1), {}, {})
        checkpoints.wait()
        limit(100_000)
        yield checkpoints.save(2, state(2), {}, {})
        yield checkpoints.save(3, state(3), {}, {})
        if then == "recovers":
            checkpoints._pending[1].exception()
            limit(resource.RLIM_INFINITY)
        yield checkpoints.save(4, state(4), {}, {})
        if then == "goes on":
            yield checkpoints.save(5, state(5), {}, {})

for then in ("goes on", "recovers", "ends"):
    try:
        for notice in train(f"{sys.argv[1]}/{then}", then):
            print(f"{then}: notice {notice}")
    except Failure as failure:
        print(f"{then}: failure {failure.code}: {failure}")
    limit(resource.RLIM_INFINITY)
"""


def test_checkpoint_full_disk_is_survived_counted_and_told(tmp_path):
    """Every file is cut off at 100 kB from the second save on, as a disk that fills up would.

    Three runs: one goes on to its third failure, one finds the disk emptied before its fourth save, one ends there.
    """
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for then in ("goes on", "recovers", "ends"):
        lines = [line.removeprefix(f"{then}: ") for line in run.stdout.splitlines() if line.startswith(then)]
        assert lines[:2] == ["notice None", "notice None"]
        assert "step 2 could not be written" in lines[2] and "failure 1 of 3" in lines[2]
        assert "step 3 could not be written" in lines[3] and "failure 2 of 3" in lines[3]
        folder = tmp_path / then
        if then == "recovers":
            assert len(lines) == 4 and steps_in(folder) == ["00000001", "00000004"]
        else:
            assert lines[4].startswith("failure 4: the checkpoint of step 4 could not be written")
            assert "failure 3 of 3 in a row; the newest complete checkpoint is step 1" in lines[4]
            assert len(lines) == 5 and steps_in(folder) == ["00000001"]
        found = restore(folder, {"params": jax.ShapeDtypeStruct((400, 1000), jnp.float32)})
        expected = jax.random.normal(jax.random.key(found.step), (400, 1000))
        np.testing.assert_array_equal(np.asarray(found.state["params"]), np.asarray(expected))


def test_checkpoint_failed_last_save_is_told_even_after_poll(tmp_path):
    target = tmp_path / "checkpoints"
    target.write_text("a file where the folder should be")
    checkpoints = Checkpoints(target)
    checkpoints.save(1, make_state(1), {}, CONFIG)
    while (notice := checkpoints.poll()) is None:
        time.sleep(0.01)
    assert "failure 1 of 3" in notice
    with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
        checkpoints.close()


KILLED = """
import itertools, sys
import jax
from xylem.training.checkpoint import Checkpoints

draw = jax.jit(lambda step: jax.random.normal(jax.random.key(step), (2, 300, 1000)))
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in itertools.count(int(sys.argv[2])):
        checkpoints.save(step, {"params": draw(step)}, {"step": step}, {})
"""


def test_checkpoint_survives_sigkill_in_the_middle_of_a_save(tmp_path, proof, rng_seed):
    """The process saves without pause and is killed at a random moment after its folder shows a save in progress."""
    rng, wrong, kills = np.random.default_rng(rng_seed), 0, 2
    template = {"params": jax.ShapeDtypeStruct((2, 300, 1000), jnp.float32)}
    start = 1
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(start)])
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / f"{start + 2:08d}").exists() or not list(tmp_path.glob(".saving-*")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.03))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            assert not list(tmp_path.glob(".*"))
            found = checkpoints.restore(template)
        assert found is not None and found.passed_over == [] and found.step >= start + 2
        expected = jax.random.normal(jax.random.key(found.step), (2, 300, 1000))
        wrong += not np.array_equal(np.asarray(found.state["params"]), np.asarray(expected))
        wrong += found.data_state != {"step": found.step}
        start = found.step + 1
    # The mutation: a marker written first would vouch for a file that is not there.
    newest = tmp_path / f"{found.step:08d}"
    payload(tmp_path, found.step).unlink()
    assert (newest / "COMPLETE").exists() and restore(tmp_path, template).step < found.step
    mutation = "a payload removed behind a written COMPLETE marker: passed over"
    proof("checkpoint: SIGKILL while saving", f"{kills} kills, wrong restores", wrong, 0, rng_seed, mutation)


TWO_HOSTS = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]), initialization_timeout=60)
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from xylem.errors import Failure
from xylem.training import checkpoint

split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
folder, first = sys.argv[3], jax.process_index() == 0

def numbers(step):
    return np.random.default_rng(step).normal(size=(6, 300)).astype(np.float32)

def state(step):
    return {"trainable": {"w": jax.make_array_from_callback((6, 300), split, lambda part: numbers(step)[part])}}

def told(found):
    (shard,) = found.state["trainable"]["w"].addressable_shards
    same = np.array_equal(np.asarray(shard.data), numbers(found.step)[shard.index])
    print("restored", found.step, same, found.data_state, len(found.passed_over))

def fail(*_):
    raise OSError(28, "No space left on device")

try:
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"position": step}, {})
        told(checkpoints.restore(state(0)))
        if first:
            os.unlink(f"{folder}/00000002/COMPLETE")
            checkpoint.seal = fail
        multihost_utils.sync_global_devices("damaged")
        told(checkpoints.restore(state(0)))
        for step in (3, 4, 5, 6):
            checkpoints.save(step, state(step), {}, {})
        print("not reached")
except Failure as failure:
    print("failure", failure.code, failure)
"""


def test_checkpoint_two_processes_write_one_and_fail_together(tmp_path):
    """Each holds half of the array. Later process 0 alone meets a damaged checkpoint and then a full disk."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    commands = [[sys.executable, "-c", TWO_HOSTS, str(i), port, str(tmp_path)] for i in range(2)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    runs = [subprocess.Popen(command, **pipes) for command in commands]
    for index, run in enumerate(runs):
        out, errors = run.communicate(timeout=120)
        lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert run.returncode == 0 and len(lines) == 3, out + errors
        assert lines[0] == "restored 2 True {'position': 2} 0"
        assert lines[1] == f"restored 1 True {{'position': 1}} {1 - index}"
        assert lines[2].startswith("failure 4 the checkpoint of step 5 could not be written")
        assert ("No space left" if index == 0 else "another host failed") in lines[2]
