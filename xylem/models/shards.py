"""Folders of safetensors files, as Hugging Face lays them out: whole, or in shards with an index.

Where there is none, a state dict in torch's old format does (``legacy_torch.py``).

Reading parses headers first and hands out bytes later, a few rows at a time, by plain file reads: pages of a memory map
would count as this process's memory for as long as the file is open.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xylem.errors import ConfigError
from xylem.files import read_object
from xylem.models import legacy_torch
from xylem.models.conversion import listed

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
INDEX = "model.safetensors.index.json"
LEGACY = "pytorch_model.bin"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor inside a safetensors file, as its header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Consecutive rows of the first axis, about ``size`` bytes at once; a vector comes whole."""
        dtype = np.dtype(TYPES[self.dtype])
        length, *rest = self.shape
        width = dtype.itemsize * math.prod(rest)
        step = max(1, size // width) if rest else length
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            for start in range(0, length, step):
                rows = min(step, length - start)
                yield np.frombuffer(file.read(rows * width), dtype).reshape(rows, *rest)


def tensors(folder: Path) -> Mapping[str, Stored | legacy_torch.Tensor]:
    """Every tensor of a folder, from its one file or from the shards that its index names.

    Raises:
        ConfigError: neither is there, a file is missing or damaged, or the index points outside the folder.
    """
    whole, index, legacy = folder / "model.safetensors", folder / INDEX, folder / LEGACY
    if whole.exists():
        return header(whole)
    if not index.exists():
        if legacy.exists():
            return legacy_torch.tensors(legacy)
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        hint = f"; {pickles[0]} is a pickle, which can run code: save it as safetensors first" if pickles else ""
        raise ConfigError("checkpoint", str(folder), f"it must hold model.safetensors or {INDEX}{hint}")
    where = read_object(index, "checkpoint").get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ConfigError("weight_map", where, f"{index} must map names of tensors to names of files")
    headers = {}
    for file in sorted({str(file) for file in where.values()}):
        # Only a sibling: an index is a stranger's text and must not point at the rest of the disk.
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ConfigError("weight_map", file, f"{index} may name only .safetensors files of its own folder")
        headers[file] = header(folder / file)
    absent = [name for name, file in where.items() if name not in headers[file]]
    if absent:
        raise ConfigError("weight_map", str(index), f"the shards it names lack {listed(absent)}")
    return {name: tensor for found in headers.values() for name, tensor in found.items()}


def header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file (8 bytes of length, JSON, then the bytes: the format's README)."""
    if not file.is_file():
        raise ConfigError("checkpoint", str(file), "there is no such file")
    try:
        with safe_open(file, "np"):  # checks every length and offset against the file, so that ours can be trusted
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            found = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError("checkpoint", str(file), f"it is not a whole safetensors file ({error})") from error
    found.pop("__metadata__", None)
    return {
        name: Stored(file, about["dtype"], tuple(about["shape"]), 8 + length + about["data_offsets"][0])
        for name, about in found.items()
    }


def write_folder(
    folder: Path, plan: Sequence[tuple[str, int]], tensor: Callable[[str], np.ndarray], shard_bytes: int
) -> None:
    """Write tensors in the order of ``plan`` into files of at most ``shard_bytes``, one file in memory at a time.

    Args:
        plan: (name, bytes) of every tensor; one larger than a shard gets a file of its own.
        tensor: name -> contiguous value.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in plan:
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        # transformers refuses a file that does not say whose layout its tensors have.
        save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(size for _, size in plan)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Indented, as Hugging Face writes it."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
