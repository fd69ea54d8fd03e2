"""The folder of one training run: who may write it, what was run in it, and its metrics.

    config.json      the resolved configuration; a second start must agree with it
    versions.json    Python, packages and code revision of the latest start
    starts.jsonl     one line a start: time, argv, host, process id, fields changed since the start before
    metrics.jsonl    one object a logged step (`xylem/training/metrics.py`)
    checkpoints/     `xylem/training/checkpoint.py`
    lock             held (flock) by the process that writes here; the kernel frees it however that process ends

Nothing here imports jax, so that a folder in use or a setting that differs is told within a moment of the start.
On several hosts process 0 alone writes the folder; the others open it with `writer=False`.
"""

import contextlib
import datetime
import errno
import fcntl
import fnmatch
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xylem.errors import BusyError, CheckpointError, ConfigError, Failure
from xylem.files import DISK_FULL, write_whole

CONFIG, VERSIONS, STARTS, METRICS, CHECKPOINTS, LOCK = (
    "config.json", "versions.json", "starts.jsonl", "metrics.jsonl", "checkpoints", "lock",
)  # fmt: skip


@contextlib.contextmanager
def open_run(
    folder: str | Path,
    config: Mapping[str, Any],
    argv: Sequence[str],
    *,
    changeable: Sequence[str] = ("steps",),
    needed_bytes: int = 0,
    complete: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    writer: bool = True,
) -> Iterator[Path]:
    """Create or reopen the run folder `folder` for the one process that may write it; a context manager.

    `config` is the resolved configuration, seed included: nested mappings of what JSON can hold. A folder that already
    holds one accepts only the same again, apart from the dotted fields that match a pattern of `changeable` (as
    `steps` or `log.*`); `complete` fills in the fields that did not exist yet when it was written. `needed_bytes` is an
    estimate of what the run will write, checked against the free disk. With `writer=False` nothing is locked, checked
    or written.

    Raises BusyError (75) where another process holds the folder, ConfigError (2) where the configuration differs or the
    folder cannot be written, CheckpointError (4) where the disk is full.
    """
    path = Path(folder)
    if not writer:
        yield path
        return
    with _told_as_failure(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(lock, path)
        begun = (path / CONFIG).exists()
        _require_space(path, needed_bytes)
        with _told_as_failure(path):
            _record_start(path, json.loads(json.dumps(config)), list(argv), changeable, complete)
        try:
            yield path
        except ConfigError:
            if not begun and not (path / CHECKPOINTS).exists():
                (path / CONFIG).unlink()  # nothing was trained: the mended command is not held to the mistake
            raise
    finally:
        os.close(lock)  # closing frees the lock


def drop_after(metrics: str | Path, step: int) -> int:
    """Drop from a metrics file what a dead run logged after `step`, where training resumes; return how many rows.

    Also drops a last line that was cut in the middle and anything else that is not a row, so that what remains is one
    JSON object a line with steps rising. The file is replaced whole or not at all.
    """
    path = Path(metrics)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines()
    kept, last = [], -1
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row_step = json.loads(line)["step"]
            if last < row_step <= step:
                kept.append(line)
                last = row_step
    if len(kept) < len(lines):
        with _told_as_failure(path):
            write_whole(path, b"".join(line + b"\n" for line in kept))
    return len(lines) - len(kept)


def raise_as_failure(path: str | Path, error: OSError) -> NoReturn:
    """Turn an OSError of writing `path` into the Failure a user reads: a full disk is 4, a path that cannot be is 2."""
    if error.errno in DISK_FULL:
        raise CheckpointError(f"{path}: disk full ({error.strerror}); what was written before is intact") from error
    if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or error.errno == errno.EROFS:
        raise ConfigError("run-dir", str(path), f"a folder is needed that can be written ({error.strerror})") from error
    raise Failure(f"{path}: could not be written ({error.strerror or error})") from error


@contextlib.contextmanager
def _told_as_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise_as_failure(path, error)


def _take(lock: int, folder: Path) -> None:
    """Take the exclusive lock and write our name into it, or raise BusyError with the name that is there."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 4096, 0).decode(errors="replace").strip() or "another process"
        raise BusyError(f"{folder}: in use by {holder}; wait for it, or name another --run-dir") from None
    with _told_as_failure(folder):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0)


def _require_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder}: the run needs about {needed_bytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            "free some, or name another --run-dir"
        )


def _record_start(folder: Path, config: dict, argv: list[str], changeable: Sequence[str], complete: Any) -> None:
    changed = _changes(folder, config, changeable, complete)
    versions = _versions()
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_whole(folder / VERSIONS, json.dumps(versions, indent=2) + "\n")
    start = {"time": _now(), "argv": argv, "host": socket.gethostname(), "pid": os.getpid(), "changed": changed}
    before = (folder / STARTS).read_bytes() if (folder / STARTS).exists() else b""
    write_whole(folder / STARTS, before + json.dumps(start).encode() + b"\n")


def _changes(folder: Path, config: dict, changeable: Sequence[str], complete: Any) -> dict[str, list]:
    """Fields whose value differs from the folder's: {field: [there, now]}; ConfigError where one may not."""
    try:
        there = json.loads((folder / CONFIG).read_text())
        with contextlib.suppress(ConfigError, TypeError):  # a run of another kind: the table below says so
            there = json.loads(json.dumps(complete(there)))
        there = _flat(there)
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ConfigError("run-dir", str(folder), f"its {CONFIG} is not readable JSON; name another folder") from None
    now = _flat(config)
    absent = "(absent)"
    changed = {
        field: [there.get(field, absent), now.get(field, absent)]
        for field in sorted({*there, *now})
        if there.get(field, absent) != now.get(field, absent)
    }
    refused = [f for f in changed if not any(fnmatch.fnmatchcase(f, pattern) for pattern in changeable)]
    if refused:
        table = "".join(f"\n  {f}: there {changed[f][0]!r}, now {changed[f][1]!r}" for f in refused)
        allowed = f"it holds a run with other settings; use these again or name another folder:{table}"
        raise ConfigError("run-dir", str(folder), allowed)
    return changed


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted path: value}; lists stay whole."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    flat = {}
    for name, branch in tree.items():
        flat |= _flat(branch, f"{prefix}.{name}" if prefix else name)
    return flat


def _versions() -> dict[str, Any]:
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "code": _revision(Path(__file__).parent),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _revision(folder: Path) -> str | None:
    """Git commit of the code, "+changes" where the working tree differs from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
