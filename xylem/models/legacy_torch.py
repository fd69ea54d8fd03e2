"""State dicts as torch wrote them before version 1.6: ``pytorch_model.bin`` of older checkpoints, without running one.

Such a file is five pickles (a magic number, the protocol, the machine, the object, the names of the storages) and then
the storages, each a count and its bytes (``torch/serialization.py``, ``_legacy_save``). A pickle is a program. Here
the programs are read as a list of opcodes by ``pickletools`` and followed by an interpreter that knows the few opcodes,
and the four things those call, that a state dict is made of. It builds numbers, strings, lists and dicts; nothing is
imported, called or allocated because a file says so, and what it does not know it refuses by name.
"""

from __future__ import annotations

import io
import math
import pickletools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from xylem.errors import ConfigError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
ZIP = b"PK\x03\x04"
PROGRAM_BYTES = 1 << 22  # of all five pickles: a tensor takes some 200
ORDERED, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
# torch's storages, and the names that safetensors has for their types.
STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
TYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
}


@dataclass(frozen=True)
class Tensor:
    """A tensor inside a legacy file.

    Attributes:
        dtype: as safetensors spells it.
        offset: of its first element in the file, in bytes.
        strides: elements from one index of each axis to the next.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """Consecutive rows of the first axis, about ``size`` bytes at once; vectors, and what is strided, whole."""
        dtype = np.dtype(TYPES[self.dtype])
        rows = self.shape[0] if self.shape else 1
        width = math.prod(self.shape[1:]) * dtype.itemsize
        whole = len(self.shape) < 2 or self.strides != _contiguous(self.shape)
        step = max(1, rows if whole else size // max(width, 1))
        with open(self.file, "rb") as file:
            for start in range(0, rows, step):
                shape = (min(step, rows - start), *self.shape[1:]) if self.shape else ()
                file.seek(self.offset + start * width)
                flat = np.frombuffer(file.read(_span(shape, self.strides) * dtype.itemsize), dtype)
                strides = [stride * dtype.itemsize for stride in self.strides]
                yield np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a legacy torch file that holds a state dict, by name; their bytes are not read yet.

    Raises:
        ConfigError: the file is of another kind, holds something else, is damaged, or its program does what no state
            dict needs; the opcode, or what it calls, is named.
    """
    with open(file, "rb") as stream:
        # BytesIO: a length that a hostile file gives is cut to what there is before memory is taken for it.
        programs = _Programs(file, io.BytesIO(stream.read(min(PROGRAM_BYTES, file.stat().st_size))))
        if programs.stream.getvalue().startswith(ZIP):
            raise programs.refusal("it is a zip archive, which torch writes since version 1.6")
        try:
            if programs.next() != MAGIC:
                raise programs.refusal("it lacks the magic number of torch's files before version 1.6")
            if programs.next() != PROTOCOL or programs.next().get("little_endian") is not True:
                raise programs.refusal("it is of another protocol, or of a big-endian machine")
            found, keys = programs.next(), programs.next()
            starts = _lay_out(programs, stream, keys)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise programs.refusal(f"it is damaged or no torch file ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(value, _View) for value in found.values()):
        raise programs.refusal("it must hold a state dict, which is a dict of tensors")
    return {
        name: Tensor(file, view.storage.dtype, view.shape, starts[view.storage.key] + view.start, view.strides)
        for name, view in found.items()
    }


class _Global(str):
    """The name of something in a module, which a program may only call or mention."""


class _Storage(NamedTuple):
    key: str
    dtype: str
    count: int


class _View(NamedTuple):
    storage: _Storage
    start: int  # in bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Programs:
    """The pickles of one file, interpreted one after the other, and the storages that they mention."""

    def __init__(self, file: Path, stream: io.BytesIO):
        self.file, self.stream = file, stream
        self.storages: dict[str, _Storage] = {}
        self.place = "its beginning"

    def refusal(self, problem: str) -> ConfigError:
        hint = "a pickle can run code: save it as safetensors first"
        return ConfigError("checkpoint", str(self.file), f"{problem} (at {self.place}); {hint}")

    def next(self) -> Any:
        """The value of the next program.

        The opcodes are those of pickle protocol 2 (``pickletools.opcodes`` tells what each does to the stack).
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def to_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        argument: Any
        for opcode, argument, position in pickletools.genops(self.stream):
            self.place = f"byte {position}, opcode {opcode.name}"
            match opcode.name:
                case "PROTO" if argument == 2:
                    pass
                case "STOP":
                    (value,) = stack
                    return value
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                    stack.append(argument)
                case "GLOBAL":
                    stack.append(self.allowed(argument))
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack[-int(opcode.name[-1]) :] = [tuple(_last(stack, int(opcode.name[-1])))]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "APPEND" | "APPENDS":
                    items = to_mark() if opcode.name == "APPENDS" else [stack.pop()]
                    _of(list, stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = to_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    _of(dict, stack[-1]).update(_pairs(items))
                case "BINPERSID":
                    stack.append(self.storage(*_of(tuple, stack.pop())))
                case "REDUCE":
                    arguments = _of(tuple, stack.pop())
                    stack.append(self.call(stack.pop(), arguments))
                case "BUILD":  # an OrderedDict's attributes: version numbers of modules
                    for each in (stack.pop(), stack[-1]):
                        _of(dict, each)
                case _:
                    raise self.refusal(f"its opcode {opcode.name} is none that a state dict needs")
        raise AssertionError("pickletools ends at STOP or raises")

    def allowed(self, name: str) -> _Global:
        if name in (ORDERED, REBUILD) or name in STORAGES:
            return _Global(name)
        raise self.refusal(f"it asks for {name.replace(' ', '.')!r}, which no state dict needs")

    def call(self, function: Any, arguments: tuple) -> Any:
        if isinstance(function, _Global) and function == ORDERED and arguments == ():
            return {}
        if isinstance(function, _Global) and function == REBUILD:
            return self.view(*arguments)
        raise self.refusal(f"it calls {str(function)[:80]!r}" if isinstance(function, str) else "it calls no function")

    def storage(self, tag: Any, kind: Any, key: Any, device: Any, count: Any, view: Any) -> _Storage:
        """What a persistent id stands for. Storages that are parts of others (torch 0.3) are refused."""
        if tag != "storage" or not isinstance(kind, _Global) or kind not in STORAGES or view is not None:
            raise self.refusal("its persistent id is not that of a storage")
        storage = _Storage(_of(str, key), STORAGES[kind], _count(count))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise self.refusal(f"storage {key} is declared in two ways")
        return storage

    def view(self, storage: Any, start: Any, shape: Any, strides: Any, gradient: Any, hooks: Any) -> _View:
        """A tensor in its storage; one that repeats elements could be of any size and is refused."""
        storage, start = _of(_Storage, storage), _count(start)
        shape, strides = (tuple(map(_count, _of(tuple, sizes))) for sizes in (shape, strides))
        end, elements = start + _span(shape, strides), math.prod(shape)
        if len(shape) != len(strides) or (elements and end > storage.count) or elements > storage.count:
            raise self.refusal(f"a tensor of shape {shape} does not fit into its storage of {storage.count}")
        return _View(storage, start * np.dtype(TYPES[storage.dtype]).itemsize, shape, strides)


def _lay_out(programs: _Programs, stream: io.BufferedReader, keys: Any) -> dict[str, int]:
    """Where the elements of every storage begin; the counts that stand in front of them are checked."""
    if len(set(_of(list, keys))) != len(keys) or set(keys) != programs.storages.keys():
        raise programs.refusal("its list of storages is not that of its tensors")
    starts, position, size = {}, programs.stream.tell(), programs.file.stat().st_size
    for key in keys:
        storage = programs.storages[key]
        stream.seek(position)
        count = int.from_bytes(stream.read(8), "little")
        starts[key] = position + 8
        position = starts[key] + storage.count * np.dtype(TYPES[storage.dtype]).itemsize
        if count != storage.count or position > size:
            raise programs.refusal(f"storage {key} has {count} elements, not {storage.count}, or is cut short")
    if position != size:
        raise programs.refusal(f"{size - position} bytes follow its last storage")
    return starts


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is wanted where a {type(value).__name__} stands")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not 0 <= _of(int, value) <= sys.maxsize:
        raise ValueError("a count is negative or too large")
    return value


def _last(stack: list[Any], number: int) -> list[Any]:
    if len(stack) < number:
        raise IndexError("the stack is empty")
    return stack[-number:]


def _pairs(items: list[Any]) -> Mapping[str, Any]:
    """Keys and values in turn. Keys are strings: hashing deep tuples would take a time that doubles with each level."""
    return dict(zip(map(_of, repeat(str), items[::2]), items[1::2], strict=True))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
