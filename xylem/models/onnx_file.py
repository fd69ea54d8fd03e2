"""ONNX files: nodes of the graph and where each initializer lies, read without the ``onnx`` package.

An ONNX file is one protocol buffer: fields of (number, wire type, value), some of which are messages of such fields
again (https://protobuf.dev/programming-guides/encoding/). The few numbers used here are those of onnx.proto3. Weights
stay in the file; like those of safetensors they are handed out a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from xylem.errors import ConfigError
from xylem.models.shards import Stored

FLOAT = 1  # TensorProto.DataType
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
NAME_BYTES = 1 << 16


class Span(NamedTuple):
    """Bytes of the file: a string, a message or the content of a tensor."""

    start: int
    stop: int


@dataclass(frozen=True)
class Node:
    """One operation of the graph; ``floats`` are its attributes that are single numbers."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    floats: dict[str, float] = field(default_factory=dict)


def read(path: Path) -> tuple[list[Node], dict[str, Stored]]:
    """The nodes of a model's graph in order, and its float32 initializers by name.

    Constants are nodes of kind ``Constant``, with their value among ``floats`` when it is one number.

    Raises:
        ConfigError: the file is damaged, is no ONNX model, or keeps its weights in other files or types.
    """
    nodes, stored = [], {}
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            graphs = [value for number, value in _fields(file, Span(0, size)) if number == 7]
            (graph,) = graphs
            for number, value in _fields(file, graph):
                if number == 1:
                    nodes.append(_node(file, value))
                elif number == 5:
                    name, tensor = _tensor(path, file, value)
                    stored[name] = tensor
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ConfigError("checkpoint", str(path), f"it is damaged or no ONNX model ({error})") from error
    return nodes, stored


def _fields(file: BinaryIO, span: Span) -> Iterator[tuple[int, Any]]:
    """The fields of a message: numbers as int, bytes as the ``Span`` where they lie."""
    position = span.start
    while position < span.stop:
        file.seek(position)
        key = _varint(file)
        if key & 7 == VARINT:
            value = _varint(file)
        elif key & 7 == BYTES:
            length = _varint(file)
            value = Span(file.tell(), file.tell() + length)
            file.seek(value.stop)
        elif key & 7 in (FIXED32, FIXED64):
            value = Span(file.tell(), file.tell() + (4 if key & 7 == FIXED32 else 8))
            file.seek(value.stop)
        else:
            raise ValueError(f"wire type {key & 7}")
        position = file.tell()
        if position > span.stop:
            raise ValueError("a field ends behind its message")
        yield key >> 3, value


def _varint(file: BinaryIO) -> int:
    """A whole number in groups of seven bits, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = file.read(1)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number of more than ten bytes")


def _content(file: BinaryIO, span: Span) -> bytes:
    if span.stop - span.start > NAME_BYTES:
        raise ValueError(f"{span.stop - span.start} bytes where a name or a number should be")
    file.seek(span.start)
    return file.read(span.stop - span.start)


def _text(file: BinaryIO, span: Span) -> str:
    return _content(file, span).decode("utf-8")


def _node(file: BinaryIO, span: Span) -> Node:
    """NodeProto: 1 input, 2 output, 3 name, 4 op_type, 5 attribute."""
    found: dict[int, list[Any]] = {number: [] for number in range(1, 6)}
    for number, value in _fields(file, span):
        found.setdefault(number, []).append(value)
    inputs, outputs, names, kinds = ([_text(file, one) for one in found[number]] for number in range(1, 5))
    floats = dict(pair for one in found[5] if (pair := _float_attribute(file, one)))
    return Node(kinds[0], names[0] if names else "", inputs, outputs, floats)


def _float_attribute(file: BinaryIO, span: Span) -> tuple[str, float] | None:
    """AttributeProto: 1 name, 2 a float, 5 a tensor, whose 2 is its type and 9 its bytes."""
    fields = dict(_fields(file, span))
    tensor = dict(_fields(file, fields[5])) if 5 in fields else {}
    number = fields.get(2) or (tensor.get(9) if tensor.get(2) == FLOAT else None)
    if number is None or number.stop - number.start != 4:
        return None
    return _text(file, fields[1]), float(np.frombuffer(_content(file, number), "<f4")[0])


def _tensor(path: Path, file: BinaryIO, span: Span) -> tuple[str, Stored]:
    """TensorProto: 1 dims, packed or not, 2 data_type, 8 name, 9 raw_data."""
    shape, fields = [], {}
    for number, value in _fields(file, span):
        if number == 1 and isinstance(value, Span):
            file.seek(value.start)
            while file.tell() < value.stop:
                shape.append(_varint(file))
        elif number == 1:
            shape.append(value)
        else:
            fields[number] = value
    name = _text(file, fields[8]) if 8 in fields else ""
    if fields.get(2) != FLOAT or 9 not in fields:
        raise ConfigError(name, f"type {fields.get(2)}", f"in {path}: only float32 weights inside the file can be read")
    if 4 * math.prod(shape) != fields[9].stop - fields[9].start:
        raise ValueError(f"{name} has not the bytes that its shape {tuple(shape)} needs")
    return name, Stored(path, "F32", tuple(shape), fields[9].start)
