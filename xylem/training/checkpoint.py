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
import hashlib
import json
import os
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
from xylem.training.run_folder import CHECKPOINTS, sync_folder, write_whole

ARRAYS, MANIFEST, COMPLETE = "arrays", "manifest.json", "COMPLETE"
# Hidden names: being written, waiting for a newer one of the same step, waiting to be deleted.
SAVING, REPLACED, RETIRED = ".saving-", ".replaced-", ".retired-"
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
            _clean(self.folder)

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
        manifest |= {"data_state": data_state, "metadata": metadata, "tree": _describe(arrays)}
        manifest = json.loads(json.dumps(manifest))  # as of now, whatever the caller changes later
        building = self.folder / f"{SAVING}{step:08d}"
        future: Future = Future()
        try:
            if jax.process_index() == 0:
                shutil.rmtree(building, ignore_errors=True)
            self._orbax.save(building / ARRAYS, args=ocp.args.StandardSave(_nest(arrays)))
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
        if not _anywhere(error is not None):
            self._failures = 0
            return None
        self._failures += 1
        reason = f"{type(error).__name__}: {_first_line(error)}" if error else "another host failed"
        self._notice = (
            f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); "
            f"failure {self._failures} of {self.attempts} in a row"
        )
        if self._failures >= self.attempts:
            raise CheckpointError(f"{self._notice}; {self._whole()}") from error
        return self._notice

    def _whole(self) -> str:
        whole = [entry.step for entry in _entries(self.folder) if not entry.problem]
        return f"the newest complete checkpoint is step {whole[0]}" if whole else "there is no complete checkpoint"

    def _finish(self, building: Path, manifest: dict[str, Any]) -> None:
        """In the background: wait for Orbax, then write the proof, publish the folder and retire older ones."""
        try:
            self._orbax.wait_until_finished()  # ends with a barrier: all hosts have written
            if jax.process_index() == 0:
                _seal(self.folder, building, manifest)
                _publish(building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if jax.process_index() == 0:
            _retire(self.folder, self.keep)
        self._completed_at = time.monotonic()


def restore(folder: str | Path, abstract_state: Any, step: Step = "latest") -> Restored | None:
    """Restore a checkpoint of `folder` into the structure of `abstract_state`; None where there is none at all.

    `abstract_state` has arrays or `jax.ShapeDtypeStruct`s as leaves, with the sharding each is to have here (the first
    local device where it has none); device count and mesh may differ from those that saved. "latest" takes the newest
    that is whole and fits, and says in `passed_over` why newer ones were not taken. A step asked for by number, or as
    "best", is taken or fails. Raises CheckpointError where none can be used, with a table of what differs.
    """
    wanted = _by_path(abstract_state)
    entry, passed_over = _agree(lambda: _choose(Path(folder), step, lambda tree: _differences(tree, wanted)))
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
        return [] if abstract is None else _differences(ours, _by_path(abstract))

    found, _ = _agree(lambda: _choose(folder, step, check, [_entry(path)] if single else None))
    if found is None:
        raise ConfigError("checkpoint", str(path), "it must be a run folder, its checkpoints folder or one checkpoint")
    tree = found.manifest["tree"]
    names = stored(tree)
    specs = {short: jax.ShapeDtypeStruct(tuple(tree[name][0]), tree[name][1]) for short, name in names.items()}
    wanted = specs if abstract is None else _by_path(abstract)
    arrays = _read(found.path, {names[short]: leaf for short, leaf in wanted.items()})
    leaves = {short: arrays[names[short]] for short in wanted}
    params = _nest(leaves) if abstract is None else jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())
    return params, found.manifest["metadata"]


# ---- writing -----------------------------------------------------------------------------------------------------


def _seal(folder: Path, building: Path, manifest: dict[str, Any]) -> None:
    """Write manifest and marker into a folder whose arrays are written, syncing every file on the way."""
    there = [entry for entry in _entries(folder) if not entry.problem]
    # Saved again (after a resume): the same step was already found best.
    manifest["best"] |= any(entry.step == manifest["step"] and entry.manifest["best"] for entry in there)
    manifest["serial"] = 1 + max((entry.manifest["serial"] for entry in there), default=0)
    files = sorted(path for path in building.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(lambda path: _sha256(path, sync=True), files))
    manifest["files"] = {
        path.relative_to(building).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    for inner in {path.parent for path in files}:
        sync_folder(inner)
    body = json.dumps(manifest, indent=1).encode()
    write_whole(building / MANIFEST, body)
    write_whole(building / COMPLETE, hashlib.sha256(body).hexdigest() + "\n")


def _publish(building: Path) -> None:
    """Give a sealed folder its name. At every moment one complete checkpoint of the step can be found by `_clean`."""
    name = building.name.removeprefix(SAVING)
    final, replaced = building.with_name(name), building.with_name(REPLACED + name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    building.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _retire(folder: Path, keep: int) -> None:
    """Delete complete checkpoints that are neither among the newest `keep` nor the newest best one."""
    whole = [entry for entry in _entries(folder) if not entry.problem]
    best = next((entry for entry in whole if entry.manifest["best"]), None)
    for entry in whole[keep:]:
        if entry is not best:
            retired = entry.path.with_name(RETIRED + entry.path.name)
            entry.path.rename(retired)
            shutil.rmtree(retired, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Finish or clear away what a killed process left under hidden names."""
    for path in folder.glob(f"{RETIRED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{SAVING}*"):
        if (path / COMPLETE).exists():
            _publish(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{REPLACED}*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


# ---- choosing and reading ----------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    path: Path
    step: int
    manifest: dict[str, Any]
    problem: str | None


def _entries(folder: Path) -> list[_Entry]:
    """Checkpoints in `folder`, newest first; those whose age cannot be known (no valid manifest) before all others."""
    paths = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    entries = [_entry(path) for path in paths]
    return sorted(entries, key=lambda e: (e.manifest.get("serial", float("inf")), e.step), reverse=True)


def _entry(path: Path) -> _Entry:
    """Marker and manifest of one checkpoint; `problem` says what is wrong with them."""
    step = int(path.name) if path.name.isdigit() else -1
    try:
        body = (path / MANIFEST).read_bytes()
        if (path / COMPLETE).read_text().strip() != hashlib.sha256(body).hexdigest():
            return _Entry(path, step, {}, f"{MANIFEST} is damaged: {COMPLETE} names another SHA-256")
        manifest = json.loads(body)
    except FileNotFoundError as error:
        return _Entry(path, step, {}, f"{Path(error.filename).name} is missing")
    except (OSError, ValueError) as error:
        return _Entry(path, step, {}, _first_line(error))
    if step not in (-1, manifest["step"]):
        return _Entry(path, step, {}, f"{MANIFEST} is of step {manifest['step']}")
    return _Entry(path, manifest["step"], manifest, None)


def _choose(
    folder: Path, step: Step, check: Callable[[dict[str, list]], list[str]], entries: list[_Entry] | None = None
) -> tuple[_Entry | None, list[str]]:
    """The newest usable checkpoint and a line for each passed over; for an explicit step, that one or an error."""
    entries = _entries(folder) if entries is None else entries
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
        problem = problem or _damage(entry)
        if not problem:
            return entry, passed_over
        passed_over.append(f"{entry.path}: {problem}")
    if passed_over:
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(passed_over))
    return None, []


def _damage(entry: _Entry) -> str | None:
    """The first file that is not as the manifest says, or None: sizes first, then every byte."""
    for name, listed in entry.manifest["files"].items():
        path = entry.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != listed["size"]:
            return f"{name} has {path.stat().st_size} bytes, {listed['size']} were written"
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(lambda name: _sha256(entry.path / name), entry.manifest["files"])
        for (name, listed), digest in zip(entry.manifest["files"].items(), hashes, strict=True):
            if digest != listed["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    return None


def _differences(tree: dict[str, list], wanted: Mapping[str, Any], most: int = 20) -> list[str]:
    """What differs between the arrays of a checkpoint and those of the model, one line each, at most `most`."""
    ours, lines = _describe(wanted), []
    for path in sorted({*tree, *ours}):
        if path not in ours or path not in tree:
            lines.append(f"{path}: only in the {'checkpoint' if path in tree else 'model'}")
        elif tree[path] != ours[path]:
            (shape, dtype), (our_shape, our_dtype) = tree[path], ours[path]
            shapes = (f"{tuple(shape)} ", f"{tuple(our_shape)} ") if shape != our_shape else ("", "")
            dtypes = (dtype, our_dtype) if dtype != our_dtype else ("", "")
            theirs, mine = (f"{s}{d}".strip() for s, d in zip(shapes, dtypes, strict=True))
            lines.append(f"{path}: checkpoint {theirs}, model {mine}")
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


def _read(path: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Read the arrays named by `wanted`, each onto its sharding; the caller has compared shapes and dtypes."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = _nest({
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
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return named


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _describe(leaves: Mapping[str, Any]) -> dict[str, list]:
    return {path: [list(leaf.shape), str(np.dtype(leaf.dtype))] for path, leaf in leaves.items()}


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sha256(path: Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException, most: int = 300) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def _anywhere(failed: bool) -> bool:
    """Whether it failed on any host."""
    if jax.process_count() == 1:
        return failed
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))


def _agree(choose: Callable[[], tuple[_Entry | None, list[str]]]) -> tuple[_Entry | None, list[str]]:
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
    return (entry or _entry(Path(outcome)) if outcome else None), passed_over
