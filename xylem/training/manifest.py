"""What proves a checkpoint whole: its manifest, its marker, and the names a folder goes through.

A folder is built as ``.saving-STEP``, sealed, and renamed; ``checkpoint.py`` says what is inside. Nothing here knows
Orbax, meshes or trees of arrays: a manifest describes those as path -> [shape, dtype].
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xylem.files import sha256, sync, write_whole

ARRAYS, MANIFEST, COMPLETE = "arrays", "manifest.json", "COMPLETE"
# Hidden names: being written, waiting for a newer one of the same step, waiting to be deleted.
SAVING, REPLACED, RETIRED = ".saving-", ".replaced-", ".retired-"


class Entry(NamedTuple):
    """One checkpoint as found: its manifest, or what is wrong with it."""

    path: Path
    step: int
    manifest: dict[str, Any]
    problem: str | None


def entries_of(folder: Path) -> list[Entry]:
    """Checkpoints in `folder`, newest first; those whose age cannot be known (no valid manifest) before all others."""
    paths = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    entries = [entry_of(path) for path in paths]
    return sorted(entries, key=lambda e: (e.manifest.get("serial", float("inf")), e.step), reverse=True)


def entry_of(path: Path) -> Entry:
    """Marker and manifest of one checkpoint; `problem` says what is wrong with them."""
    step = int(path.name) if path.name.isdigit() else -1
    try:
        body = (path / MANIFEST).read_bytes()
        if (path / COMPLETE).read_text().strip() != hashlib.sha256(body).hexdigest():
            return Entry(path, step, {}, f"{MANIFEST} is damaged: {COMPLETE} names another SHA-256")
        manifest = json.loads(body)
    except FileNotFoundError as error:
        return Entry(path, step, {}, f"{Path(error.filename).name} is missing")
    except (OSError, ValueError) as error:
        return Entry(path, step, {}, first_line(error))
    if step not in (-1, manifest["step"]):
        return Entry(path, step, {}, f"{MANIFEST} is of step {manifest['step']}")
    return Entry(path, manifest["step"], manifest, None)


def seal(folder: Path, building: Path, manifest: dict[str, Any]) -> None:
    """Write manifest and marker into a folder whose arrays are written, syncing every file on the way."""
    there = [entry for entry in entries_of(folder) if not entry.problem]
    # Saved again (after a resume): the same step was already found best.
    manifest["best"] |= any(entry.step == manifest["step"] and entry.manifest["best"] for entry in there)
    manifest["serial"] = 1 + max((entry.manifest["serial"] for entry in there), default=0)
    files = sorted(path for path in building.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(lambda path: sha256(path, durable=True), files))
    manifest["files"] = {
        path.relative_to(building).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    for inner in {path.parent for path in files}:
        sync(inner)
    body = json.dumps(manifest, indent=1).encode()
    write_whole(building / MANIFEST, body)
    write_whole(building / COMPLETE, hashlib.sha256(body).hexdigest() + "\n")


def publish(building: Path) -> None:
    """Give a sealed folder its name. At every moment one complete checkpoint of the step can be found by `clean`."""
    name = building.name.removeprefix(SAVING)
    final, replaced = building.with_name(name), building.with_name(REPLACED + name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    building.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def retire(folder: Path, keep: int) -> None:
    """Delete complete checkpoints that are neither among the newest `keep` nor the newest best one."""
    whole = [entry for entry in entries_of(folder) if not entry.problem]
    best = next((entry for entry in whole if entry.manifest["best"]), None)
    for entry in whole[keep:]:
        if entry is not best:
            retired = entry.path.with_name(RETIRED + entry.path.name)
            entry.path.rename(retired)
            shutil.rmtree(retired, ignore_errors=True)


def clean(folder: Path) -> None:
    """Finish or clear away what a killed process left under hidden names."""
    for path in folder.glob(f"{RETIRED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{SAVING}*"):
        if (path / COMPLETE).exists():
            publish(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{REPLACED}*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


def damage(entry: Entry) -> str | None:
    """The first file that is not as the manifest says, or None: sizes first, then every byte."""
    for name, listed in entry.manifest["files"].items():
        path = entry.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != listed["size"]:
            return f"{name} has {path.stat().st_size} bytes, {listed['size']} were written"
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(lambda name: sha256(entry.path / name), entry.manifest["files"])
        for (name, listed), digest in zip(entry.manifest["files"].items(), hashes, strict=True):
            if digest != listed["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    return None


def differences(tree: dict[str, list], wanted: Mapping[str, Any], most: int = 20) -> list[str]:
    """What differs between the arrays of a checkpoint and those of the model, one line each, at most `most`."""
    ours, lines = describe(wanted), []
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


def describe(leaves: Mapping[str, Any]) -> dict[str, list]:
    """Shape and dtype of each array by its path, as a manifest holds them."""
    return {path: [list(leaf.shape), str(np.dtype(leaf.dtype))] for path, leaf in leaves.items()}


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line of at most `most` characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
