"""Checkpoints: whole or not there, whatever happens to the process, the disk or the files."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xylem.errors import CheckpointError, ConfigError
from xylem.training import checkpoint
from xylem.training.checkpoint import Checkpoints, load_params, restore

CONFIG = {"config": {"model": {"d_model": 24}}, "tokenizer": "0" * 64}


@struct.dataclass
class State:
    step: jax.Array
    trainable: dict
    frozen: dict
    optimizer: tuple
    rng: jax.Array


def make_state(step: int, width: int = 5, dtype=jnp.float32) -> State:
    """A state whose every array is a function of the step: what is restored shows which save it came from."""
    keys = jax.random.split(jax.random.key(step), 3)
    up = jax.random.normal(keys[0], (2, 24, width)).astype(dtype)
    trainable = {"layers": {"mlp": {"up": {"kernel": up, "bias": None}}}, "positions": {}}
    frozen = {"layers": {"mlp": {"up": {"kernel": None, "bias": jax.random.normal(keys[1], (2, width), jnp.bfloat16)}}}}
    optimizer = optax.adamw(1e-3).init(trainable)
    return State(jnp.int32(step), trainable, frozen, optimizer, jax.random.key_data(keys[2]))


def save(folder: Path, *steps: int, **options) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"position": 7 * step}, CONFIG) is None


def assert_equal(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def payload(folder: Path, step: int) -> Path:
    """The largest file of arrays."""
    return max((folder / f"{step:08d}" / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)


def test_checkpoint_round_trip_restores_every_bit_and_what_belongs_to_it(tmp_path):
    save(tmp_path, 3)
    found = restore(tmp_path, make_state(0))
    assert_equal(found.state, make_state(3))
    assert (found.step, found.data_state, found.metadata, found.passed_over) == (3, {"position": 21}, CONFIG, [])


def test_checkpoint_manifest_lists_every_file_and_array(tmp_path):
    save(tmp_path, 3)
    manifest = json.loads((tmp_path / "00000003" / "manifest.json").read_text())
    there = {p.relative_to(tmp_path / "00000003").as_posix() for p in (tmp_path / "00000003").rglob("*") if p.is_file()}
    assert there == {*manifest["files"], "manifest.json", "COMPLETE"}
    assert manifest["tree"]["trainable/layers/mlp/up/kernel"] == [[2, 24, 5], "float32"]
    assert manifest["tree"]["frozen/layers/mlp/up/bias"] == [[2, 5], "bfloat16"]
    assert manifest["step"] == 3 and manifest["metadata"] == CONFIG


def test_checkpoint_restore_of_nothing_is_none(tmp_path):
    assert restore(tmp_path / "absent", make_state(0)) is None
    assert restore(tmp_path, make_state(0)) is None


def test_checkpoint_saves_what_was_there_when_save_was_called(tmp_path):
    """The next step donates the buffers that are still being written."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"params": jax.random.normal(jax.random.key(1), (1500, 1001)), "step": jnp.int32(0)}
    expected = np.array(state["params"])
    data_state = {"position": 1}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data_state, {})
        data_state["position"] = 2
        for _ in range(20):
            state = advance(state)
        jax.block_until_ready(state)
    found = restore(tmp_path, state)
    np.testing.assert_array_equal(np.asarray(found.state["params"]), expected)
    assert found.data_state == {"position": 1}


def flip(folder):
    path = payload(folder, 20)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    return "is damaged (its SHA-256 differs)"


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
        patch.setattr(checkpoint, "_damage", lambda entry: None)
        trusting = sum(restored_in_silence(payload(tmp_path, 20)) for _ in range(8))
    assert trusting > 0
    mutation = f"sizes and hashes not compared: {trusting} of 8 flips in the largest file restored or crashed"
    row, oracle = "checkpoint: bit flips", f"{flips} random single-bit flips, share that was not refused"
    proof(row, oracle, missed / flips, 0.0, rng_seed, mutation)
    assert_equal(restore(tmp_path, state).state, state)


def test_checkpoint_explicit_step_is_taken_or_fails(tmp_path):
    save(tmp_path, 10, 20)
    assert restore(tmp_path, make_state(0), step=10).step == 10
    flip(tmp_path)
    with pytest.raises(CheckpointError, match="damaged") as error:
        restore(tmp_path, make_state(0), step=20)
    assert error.value.code == 4
    with pytest.raises(CheckpointError, match="no checkpoint of step 15; there are: 10, 20"):
        restore(tmp_path, make_state(0), step=15)


def test_checkpoint_when_none_fits_the_differences_are_a_table(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, make_state(0, width=7))
    assert "trainable/layers/mlp/up/kernel: checkpoint (2, 24, 5), model (2, 24, 7)" in str(error.value)
    assert "optimizer/0/mu/layers/mlp/up/kernel: checkpoint (2, 24, 5), model (2, 24, 7)" in str(error.value)


def test_checkpoint_keeps_the_last_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            checkpoints.save(step, make_state(step), {}, CONFIG, best=step == 2)
    assert steps_in(tmp_path) == ["00000002", "00000004", "00000005"]
    assert restore(tmp_path, make_state(0), step="best").step == 2
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(6, make_state(6), {}, CONFIG, best=True)
    assert steps_in(tmp_path) == ["00000005", "00000006"]
    assert restore(tmp_path, make_state(0), step="best").step == 6


def test_checkpoint_without_a_best_says_so(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no complete checkpoint is marked best"):
        restore(tmp_path, make_state(0), step="best")


def test_checkpoint_same_step_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(1), {}, CONFIG, best=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(2), {}, CONFIG)
    assert steps_in(tmp_path) == ["00000010"]
    assert_equal(restore(tmp_path, make_state(0), step="best").state, make_state(2))


def test_checkpoint_newest_is_the_last_written_not_the_highest(tmp_path):
    """Back at step 10 by choice, trained on to 15: a restart goes on from there and not from the branch left behind."""
    save(tmp_path, 10, 20)
    save(tmp_path, 15)
    assert restore(tmp_path, make_state(0)).step == 15


def test_checkpoint_damaged_ones_are_never_deleted_by_age(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "00000010" / "COMPLETE").unlink()
    save(tmp_path, 11, 12, 13, keep=1)
    assert steps_in(tmp_path) == ["00000010", "00000013"]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_checkpoint_start_clears_or_finishes_what_a_kill_left(tmp_path, sealed, replaced):
    """Every moment of publishing step 20 again: sealed or not, with the former step 20 still there or set aside."""
    save(tmp_path, 10, 20)
    (tmp_path / "00000010").rename(tmp_path / ".retired-00000010")
    if replaced:
        (tmp_path / "00000020").rename(tmp_path / ".replaced-00000020")
    save(tmp_path / "elsewhere", 20)
    (tmp_path / "elsewhere" / "00000020").rename(tmp_path / ".saving-00000020")
    (tmp_path / "elsewhere").rmdir()
    if not sealed:
        (tmp_path / ".saving-00000020" / "COMPLETE").unlink()
    with Checkpoints(tmp_path):
        pass
    assert steps_in(tmp_path) == ["00000020"]
    assert restore(tmp_path, make_state(0)).step == 20


@pytest.mark.parametrize("saved, read", [((2, 4), (8, 1)), ((8, 1), (1, 2)), ((1, 1), (4, 2)), ((4, 2), (1, 1))])
def test_checkpoint_restores_onto_another_mesh(tmp_path, saved, read):
    def placed(state, sizes, abstract=False):
        mesh = Mesh(np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes), ("fsdp", "tensor"))

        def place(x):
            spec = PartitionSpec(None, "fsdp", "tensor") if x.ndim == 3 else PartitionSpec()
            sharding = NamedSharding(mesh, spec)
            return (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if abstract else jax.device_put(x, sharding)
            )

        return jax.tree.map(place, state)

    state = make_state(5, width=8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, placed(state, saved), {}, CONFIG)
    template = placed(state, read, abstract=True)
    found = restore(tmp_path, template).state
    assert_equal(found, state)
    assert jax.tree.all(jax.tree.map(lambda got, asked: got.sharding == asked.sharding, found, template))


def test_checkpoint_params_are_read_alone(tmp_path):
    state = make_state(4)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, state, {}, CONFIG)
    kernel, bias = state.trainable["layers"]["mlp"]["up"]["kernel"], state.frozen["layers"]["mlp"]["up"]["bias"]
    expected = {"layers": {"mlp": {"up": {"kernel": kernel, "bias": bias}}}}
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "00000004"):
        params, metadata = load_params(path)
        assert_equal(params, expected)
        assert metadata == CONFIG
    where = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), expected)
    params, _ = load_params(tmp_path, abstract=abstract)
    assert_equal(params, expected)
    assert all(leaf.sharding == where for leaf in jax.tree.leaves(params))


def test_checkpoint_params_that_are_not_there_are_named(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"entries: 'emma' .* holds frozen, optimizer, rng, step, trainable"):
        load_params(tmp_path, entries=("emma",))
    with pytest.raises(ConfigError, match="a run folder, its checkpoints folder or one checkpoint"):
        load_params(tmp_path / "absent")
    flip_at = payload(tmp_path, 4)
    flip_at.write_bytes(bytes(flip_at.stat().st_size))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_params(tmp_path / "00000004")


def test_checkpoint_takes_only_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for leaf in (3, np.int32(3), np.ones(2), jax.random.key(0)):
            with pytest.raises(TypeError, match="count"):
                checkpoints.save(1, {"count": leaf}, {}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, {"count": jnp.ones(2)}, {"position": object()}, {})
    assert restore(tmp_path, make_state(0)) is None


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
            checkpoint._seal = fail
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
