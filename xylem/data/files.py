"""Files that are whole or absent: hashes, locks between processes, atomic moves, a full disk told as such."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from xylem.errors import CheckpointError, Failure

Report = Callable[[str], None]

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Below this, a write that failed for an unnamed reason failed because the disk is full.
_NOTHING_FREE = 1 << 20


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the system to put a file or folder on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tells_of_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, names a full disk; the C++ writers say so in words only."""
    if error is None:
        return False
    in_words = any(os.strerror(number) in str(error) for number in _FULL)
    return getattr(error, "errno", None) in _FULL or in_words or _tells_of_full_disk(error.__cause__)


@contextmanager
def disk_full_named(folder: Path) -> Iterator[None]:
    """Turn whatever a full disk makes of a write under ``folder`` into one message.

    Raises:
        CheckpointError: no space is left (or the quota is used up).
    """
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        if not _tells_of_full_disk(error) and shutil.disk_usage(folder).free > _NOTHING_FREE:
            raise
        message = f"the disk is full: {folder} has no space for the prepared data (another folder: data.cache_dir)"
        raise CheckpointError(message) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears whole or not at all."""
    with disk_full_named(path.parent):
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        sync(path.parent)


@contextmanager
def locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock file ``path``; wait, and say so once, while another process holds it.

    The system drops the lock with the process, however that ends, so no lock is ever left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process prepares {path.stem}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder beside ``final`` that takes its place when the block ends well, and vanishes when it does not.

    Whatever stood at ``final``, and what earlier processes killed midway left beside it, is removed. The caller holds
    the lock of ``final``.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.building-"
    for left_over in final.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with disk_full_named(final.parent):
        building = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
        try:
            building.chmod(0o755)
            yield building
            for path in building.rglob("*"):
                sync(path)
            if final.exists():
                shutil.rmtree(final)
            os.replace(building, final)
            sync(final.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
