"""Files that are whole or absent: hashes, locks between processes, atomic moves, a full disk told as such."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xylem.errors import CheckpointError, ConfigError, Failure

Report = Callable[[str], None]

# No space, no quota left, or a file that may grow no further.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Below this, a write that failed for an unnamed reason failed because the disk is full.
_NOTHING_FREE = 1 << 20


def sha256(path: Path, durable: bool = False) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; ``durable`` syncs the file to the disk first."""
    with path.open("rb") as file:
        if durable:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk now (POSIX: a rename survives a power cut only after this)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tells_of_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, names a full disk; the C++ writers say so in words only."""
    if error is None:
        return False
    in_words = any(os.strerror(number) in str(error) for number in DISK_FULL)
    return getattr(error, "errno", None) in DISK_FULL or in_words or _tells_of_full_disk(error.__cause__)


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
        message = f"the disk is full: {folder} has no space left (prepared data goes elsewhere with data.cache_dir)"
        raise CheckpointError(message) from error


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before: temp sibling, fsync, rename."""
    path = Path(path)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(sibling, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)
    sync(path.parent)


def section(page: str | Path, name: str) -> tuple[str, str, str]:
    """A page before, between and behind the comments ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Raises:
        ConfigError: there is no such page, or it does not have both, once and in order.
    """
    try:
        text = Path(page).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("page", str(page), f"a Markdown file that can be read ({error})") from error
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, opened, rest = text.partition(begin)
    between, closed, behind = rest.partition(end)
    if not (opened and closed) or text.count(begin) + text.count(end) > 2:
        allowed = (
            f"it must have the lines {begin.strip()} and {end}, once and in this order: what is between is written"
        )
        raise ConfigError("page", str(page), allowed)
    return before + begin, between, end + behind


def replace_section(page: str | Path, name: str, content: str) -> None:
    """Write ``content`` between the comments of ``section``; the rest of the page stays as it is."""
    before, _, behind = section(page, name)
    write_whole(page, f"{before}{content}\n{behind}")


def read_object(file: Path, field: str) -> dict[str, Any]:
    """The JSON object in a file that may be missing, damaged or something else.

    Raises:
        ConfigError: it is; ``field`` is what the message says cannot be it.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(field, str(file.parent), f"it holds no {file.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(field, str(file), f"it is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(field, str(file), "it must be a JSON object")
    return value


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


def check_new(field: str, folder: Path) -> None:
    """Raise ConfigError where something stands at ``folder`` that is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(field, str(folder), "it must not exist yet, or be empty")


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder beside ``final`` that takes its place when the block ends well, and vanishes when it does not.

    Whatever stood at ``final``, and what earlier processes killed midway left beside it, is removed. Where several
    processes may write ``final``, the caller holds its lock.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.building-"
    for path in final.parent.iterdir():
        if path.name.startswith(prefix):
            shutil.rmtree(path, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        building.chmod(0o755)
        yield building
        for path in building.rglob("*"):
            sync(path)
        sync(building)
        if final.exists():
            shutil.rmtree(final)
        os.replace(building, final)
        sync(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
