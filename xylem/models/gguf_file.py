"""The GGUF container (ggml-org/ggml, docs/gguf.md): metadata, and tensors in blocks of a few bits a number.

``gguf.GGUFReader`` reads the same, but makes an object of each token in the file (seconds, and more memory than a small
model takes) and maps the whole of it. Here only ``gguf.dequantize`` is used, on a few rows at a time.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from xylem.errors import ConfigError

# Types of metadata values (gguf_metadata_value_type): numbers as struct codes, and the two that nest.
NUMBERS: dict[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Packed:
    """A tensor of a GGUF file: rows of blocks, each block some numbers sharing a scale."""

    file: Path
    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """What one row takes in the file."""
        numbers, width = gguf.GGML_QUANT_SIZES[self.kind]
        if self.shape[-1] % numbers:
            raise ValueError(f"{self.name}: rows of {self.shape[-1]} are no whole blocks of {numbers}")
        return self.shape[-1] // numbers * width

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Consecutive rows as float32, about ``size`` bytes at once; a vector comes whole."""
        length, *rest = self.shape if len(self.shape) > 1 else (1, *self.shape)
        step = max(1, size // (4 * math.prod(rest)))
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            for start in range(0, length, step):
                rows = min(step, length - start)
                data = np.frombuffer(file.read(rows * self.row_bytes), np.uint8).reshape(rows, self.row_bytes)
                yield self._floats(data).reshape((rows, *rest) if len(self.shape) > 1 else self.shape)

    def _floats(self, data: np.ndarray) -> np.ndarray:
        try:
            return gguf.dequantize(data, self.kind)
        except NotImplementedError:
            raise ConfigError(self.name, self.kind.name, "the gguf package does not read this type") from None


def header(path: Path) -> tuple[dict[str, Any], dict[str, Packed]]:
    """Metadata and tensors of a file; no tensor is read yet.

    Raises:
        ConfigError: there is no such file, or it is damaged or cut short.
    """
    if not path.is_file():
        raise ConfigError("checkpoint", str(path), "there is no such file")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except (OSError, ValueError, KeyError, RecursionError, MemoryError) as error:
        raise ConfigError("checkpoint", str(path), f"it is not a whole GGUF file ({error})") from error


class _Cursor:
    """Reads one value after another from little-endian bytes that may end anywhere."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise ValueError("it ends too early")
        self.at += count
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            width = struct.calcsize(NUMBERS[kind])
            return list(struct.unpack(f"<{count}{NUMBERS[kind]}", self.take(count * width)))
        return [self.value(kind) for _ in range(count)]


def _parse(path: Path, cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Packed]]:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensor_count, value_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are read, little-endian")
    raw = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(value_count)}
    found = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        found.append((name, tuple(shape[::-1]), gguf.GGMLQuantizationType(cursor.number("I")), cursor.number("Q")))
    alignment = raw.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        tensor = tensors[name] = Packed(path, name, kind, shape, start + offset)
        if not shape or min(shape) < 1:
            raise ValueError(f"{name} has shape {shape}")
        if tensor.offset + tensor.row_bytes * math.prod(shape[:-1]) > len(cursor.data):
            raise ValueError(f"it ends before {name} does")
    return raw, tensors
