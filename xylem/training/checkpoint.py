"""Checkpoints that are whole or not there at all: Orbax writes the arrays, a manifest and a last marker prove them.

Orbax alone restores flipped bits, other shapes and empty folders in silence. So each checkpoint is a folder

    checkpoints/00000100/
        arrays/          what Orbax wrote (OCDBT)
        manifest.json    size and SHA-256 of every file, path / shape / dtype of every array, step, data state, metadata
        COMPLETE         SHA-256 of manifest.json; written last

which is built under a hidden name, synced to the disk and renamed. A reader trusts a folder only when marker, manifest,
sizes and hashes agree, and compares tree, shapes and dtypes with the model before it reads an array.

*Newest* means last written, not highest step: after going back to an earlier step, what is trained from there counts.

The state is any pytree of jax arrays; it is stored as nested dicts by path, so that `params/...` can be read without
the optimizer that trained it, and restored onto any sharding. The folder is on a POSIX file system, which all hosts
share, and has one writer (`run_folder.open_run` takes the lock). On several hosts every process calls the same methods
in the same order; Orbax's own barriers order the writing, process 0 writes manifest and marker after them and decides
which checkpoint to restore, and failures are counted together. Tested with two processes on one machine and one disk;
not on several machines, nor on a network file system.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from xylem.errors import CheckpointError, ConfigError
from xylem.models.conversion import unflatten
from xylem.sharding import anywhere, path_name
from xylem.training.manifest import (
    ARRAYS,
    COMPLETE,
    MANIFEST,
    SAVING,
    Entry,
    clean,
    damage,
    describe,
    differences,
    entries_of,
    entry_of,
    first_line,
    publish,
    retire,
    seal,
)
from xylem.training.run_folder import CHECKPOINTS

Step = int | Literal["latest", "best"]


class Restored(NamedTuple):
    """A restored checkpoint. `passed_over` has one readable line for each newer one that could not be used."""

    state: Any
    data_state: dict[str, Any]
    metadata: dict[str, Any]
    step: int
    passed_over: list[str]


class Checkpoints:
    """Saves and restores the checkpoints of one run; a context manager, and the folder's only writer.

    A save returns once the arrays are copied to the host; the rest happens in the background. A failed save is noticed
    by the next `save` or `poll`, which return one line about it; the third in a row, or one that `wait` or `close` find
    failed, raises CheckpointError. The last `keep` checkpoints stay, and the best one; older ones are deleted only when
    a newer is complete.
    """

    def __init__(self, folder: str | Path, keep: int = 3, attempts: int = 3):
        if keep < 1:
            raise ConfigError("keep", keep, "at least 1 checkpoint is kept")
        self.folder, self.keep, self.attempts = Path(folder).absolute(), keep, attempts
        self._failures, self._notice = 0, ""
        self._pending: tuple[int, Future] | None = None
        self._completed_at: float | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Folders are created before save() returns: an unwritable disk then fails there, where it is counted.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)
        if jax.process_index() == 0 and self.folder.is_dir():
            clean(self.folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(CheckpointError) if kind else contextlib.nullcontext():
            self.close()

    def save(
        self, step: int, state: Any, data_state: Mapping[str, Any], metadata: Mapping[str, Any], best: bool = False
    ) -> str | None:
        """Start saving `state`; wait first for the save before, and return a line about it if it failed.

        `data_state` (where the data iterator stands) and `metadata` (config, tokenizer hash, ...) are what JSON can
        hold. `best` marks the best validation so far: it stays until another is marked. The arrays may be donated as
        soon as this returns. Raises CheckpointError at the last of `attempts` failures in a row.
        """
        notice = self._collect()
        arrays = _by_path(state)
        strange = [path for path, leaf in arrays.items() if not isinstance(leaf, jax.Array) or _is_key(leaf)]
        if strange:
            raise TypeError(f"only jax arrays are saved, and keys as their key data; not so: {', '.join(strange)}")
        manifest = {"format": 1, "step": step, "best": best, "saved_at": time.time()}
        manifest |= {"data_state": data_state, "metadata": metadata, "tree": describe(arrays)}
        manifest = json.loads(json.dumps(manifest))  # as of now, whatever the caller changes later
        building = self.folder / f"{SAVING}{step:08d}"
        future: Future = Future()
        try:
            if jax.process_index() == 0:
                shutil.rmtree(building, ignore_errors=True)
            self._orbax.save(building / ARRAYS, args=ocp.args.StandardSave(unflatten(arrays)))
            future = self._background.submit(self._finish, building, manifest)
        except Exception as error:  # whatever the file system or Orbax has to say: training goes on, the failure counts
            shutil.rmtree(building, ignore_errors=True)
            future.set_exception(error)
        self._pending = (step, future)
        return notice

    def poll(self) -> str | None:
        """Without waiting: a line about the running save if it has failed. Raises as `save` does."""
        # On several hosts the count is agreed on, which all must enter together: only save and wait do.
        if self._pending and self._pending[1].done() and jax.process_count() == 1:
            return self._collect()
        return None

    def wait(self) -> None:
        """Wait for the running save; raise CheckpointError if the last one failed."""
        self._collect()
        if self._failures:
            raise CheckpointError(f"{self._notice}; {self._whole()}")

    def close(self) -> None:
        """Wait as `wait` does, and end the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def age(self) -> float | None:
        """Seconds since the last checkpoint was completed by this process."""
        return None if self._completed_at is None else time.monotonic() - self._completed_at

    def restore(self, abstract_state: Any, step: Step = "latest") -> Restored | None:
        """`restore` of this folder, after the running save."""
        self._collect()
        return restore(self.folder, abstract_state, step)

    def _collect(self) -> str | None:
        """Wait for the running save and count it: None, or a line about its failure."""
        if self._pending is None:
            return None
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if not anywhere(error is not None):
            self._failures = 0
            return None
        self._failures += 1
        reason = f"{type(error).__name__}: {first_line(error)}" if error else "another host failed"
        self._notice = (
            f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); "
            f"failure {self._failures} of {self.attempts} in a row"
        )
        if self._failures >= self.attempts:
            raise CheckpointError(f"{self._notice}; {self._whole()}") from error
        return self._notice

    def _whole(self) -> str:
        whole = [entry.step for entry in entries_of(self.folder) if not entry.problem]
        return f"the newest complete checkpoint is step {whole[0]}" if whole else "there is no complete checkpoint"

    def _finish(self, building: Path, manifest: dict[str, Any]) -> None:
        """In the background: wait for Orbax, then write the proof, publish the folder and retire older ones."""
        try:
            self._orbax.wait_until_finished()  # ends with a barrier: all hosts have written
            if jax.process_index() == 0:
                seal(self.folder, building, manifest)
                publish(building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if jax.process_index() == 0:
            retire(self.folder, self.keep)
        self._completed_at = time.monotonic()


def restore(folder: str | Path, abstract_state: Any, step: Step = "latest") -> Restored | None:
    """Restore a checkpoint of `folder` into the structure of `abstract_state`; None where there is none at all.

    `abstract_state` has arrays or `jax.ShapeDtypeStruct`s as leaves, with the sharding each is to have here (the first
    local device where it has none); device count and mesh may differ from those that saved. "latest" takes the newest
    that is whole and fits, and says in `passed_over` why newer ones were not taken. A step asked for by number, or as
    "best", is taken or fails. Raises CheckpointError where none can be used, with a table of what differs.
    """
    wanted = _by_path(abstract_state)
    entry, passed_over = _agree(lambda: _choose(Path(folder), step, lambda tree: differences(tree, wanted)))
    if entry is None:
        return None
    leaves = _read(entry.path, wanted)
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[path] for path in wanted])
    return Restored(state, entry.manifest["data_state"], entry.manifest["metadata"], entry.step, passed_over)


def load_params(
    path: str | Path,
    *,
    entries: Sequence[str] = ("trainable", "frozen"),
    step: Step = "latest",
    abstract: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Read the parameters of a saved `TrainState`, and the metadata; nothing else is read.

    `path` is a run folder, its checkpoints folder, or one checkpoint. The trees under the top-level `entries` of the
    state are joined; of these only the first must be there. ("ema", "frozen") gives the averaged weights. Without
    `abstract` the result is nested dicts of arrays on the first local device; with it, the structure and shardings of
    `abstract`, compared as `restore` does. Raises ConfigError where `path` or the first entry does not exist,
    CheckpointError where no checkpoint there is whole.
    """
    path = Path(path)
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    single = (path / MANIFEST).exists() or (path / COMPLETE).exists()

    def stored(tree: Mapping[str, Any]) -> dict[str, str]:
        """Path in the state of each parameter, by its path among the parameters."""
        return {name.partition("/")[2]: name for name in tree if name.partition("/")[0] in entries}

    def check(tree: dict[str, list]) -> list[str]:
        there = {name.partition("/")[0] for name in tree}
        if entries[0] not in there:
            raise ConfigError("entries", entries[0], f"the checkpoint holds {', '.join(sorted(there))}", there)
        ours = {short: tree[name] for short, name in stored(tree).items()}
        return [] if abstract is None else differences(ours, _by_path(abstract))

    found, _ = _agree(lambda: _choose(folder, step, check, [entry_of(path)] if single else None))
    if found is None:
        raise ConfigError("checkpoint", str(path), "it must be a run folder, its checkpoints folder or one checkpoint")
    tree = found.manifest["tree"]
    names = stored(tree)
    specs = {short: jax.ShapeDtypeStruct(tuple(tree[name][0]), tree[name][1]) for short, name in names.items()}
    wanted = specs if abstract is None else _by_path(abstract)
    arrays = _read(found.path, {names[short]: leaf for short, leaf in wanted.items()})
    leaves = {short: arrays[names[short]] for short in wanted}
    if abstract is None:
        return unflatten(leaves), found.manifest["metadata"]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves.values()), found.manifest["metadata"]


# ---- choosing and reading ----------------------------------------------------------------------------------------


def _choose(
    folder: Path, step: Step, check: Callable[[dict[str, list]], list[str]], entries: list[Entry] | None = None
) -> tuple[Entry | None, list[str]]:
    """The newest usable checkpoint and a line for each passed over; for an explicit step, that one or an error."""
    entries = entries_of(folder) if entries is None else entries
    passed_over = []
    if step == "best":
        passed_over = [f"{entry.path}: {entry.problem}" for entry in entries if entry.problem]
        entries = [entry for entry in entries if entry.manifest.get("best")][:1]
        if not entries:
            raise CheckpointError("\n".join([f"{folder}: no complete checkpoint is marked best", *passed_over]))
    elif step != "latest":
        there = ", ".join(str(entry.step) for entry in sorted(entries, key=lambda e: e.step)) or "none"
        entries = [entry for entry in entries if entry.step == step]
        if not entries:
            raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are: {there}")
    for entry in entries:
        problem = entry.problem
        if not problem and (lines := check(entry.manifest["tree"])):
            problem = "\n  ".join(["it does not fit the model", *lines])
        problem = problem or damage(entry)
        if not problem:
            return entry, passed_over
        passed_over.append(f"{entry.path}: {problem}")
    if passed_over:
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(passed_over))
    return None, []


def _read(path: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Read the arrays named by `wanted`, each onto its sharding; the caller has compared shapes and dtypes."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = unflatten({
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for name, leaf in wanted.items()
    })  # fmt: skip
    arguments = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        request = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        return _by_path(reader.restore(path.absolute() / ARRAYS, args=request))


# ---- trees, hashes, hosts ----------------------------------------------------------------------------------------


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, as `params/layers/mlp/up/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return named


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _agree(choose: Callable[[], tuple[Entry | None, list[str]]]) -> tuple[Entry | None, list[str]]:
    """Process 0 chooses (and alone hashes); the others read the manifest of what it chose."""
    if jax.process_count() == 1:
        return choose()
    from jax.experimental import multihost_utils

    entry, passed_over, error = None, [], None
    if jax.process_index() == 0:
        try:
            entry, passed_over = choose()
        except Exception as caught:  # told to the others first: they would wait for ever
            error = caught
    outcome = "!" if error else str(entry.path.absolute()) if entry else ""
    packed = np.zeros(4096, np.uint8)
    packed[: len(outcome.encode())] = np.frombuffer(outcome.encode(), np.uint8)
    outcome = bytes(multihost_utils.broadcast_one_to_all(packed)).rstrip(b"\0").decode()
    if outcome == "!":
        raise error or CheckpointError("process 0 found no checkpoint that can be used")
    return (entry or entry_of(Path(outcome)) if outcome else None), passed_over
