"""Hostile and damaged files in torch's old format are refused, and nothing that they ask for is done."""

import os
import struct
import tracemalloc

import numpy as np
import pytest

from xylem.errors import ConfigError
from xylem.models import legacy_torch

PROTO, STOP = b"\x80\x02", b"."
OSYSTEM = b"cos\nsystem\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(count: int = 6, kind: bytes = b"ctorch\nFloatStorage\n", key: str = "7") -> bytes:
    return tuple_of(text("storage"), kind, text(key), text("cpu"), number(count), b"N") + b"Q"


def tensor(stored: bytes = b"", start: int = 0, shape=(2, 3), strides=(3, 1), function: bytes = REBUILD) -> bytes:
    sizes = (tuple_of(*map(number, each)) for each in (shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    return function + tuple_of(stored or storage(), number(start), *sizes, b"\x89", hooks) + b"R"


def state(value: bytes = b"", name: bytes = b"") -> bytes:
    return b"}" + (name or text("kernel")) + (value or tensor()) + b"s"


def file(
    tmp_path, value: bytes = b"", keys=("7",), counts=(6,), magic=0x1950A86A20F9469CFC6C, little: bytes = b"\x88",
    end: bytes = b"", cut: int | None = None,
):  # fmt: skip
    """A file as torch writes it, of one 2 x 3 tensor, with one part of it replaced."""
    path = tmp_path / "pytorch_model.bin"
    listed = b"]" + b"".join(text(key) + b"a" for key in keys)
    programs = [b"\x8a\x0a" + magic.to_bytes(10, "little"), b"M\xe9\x03", b"}" + text("little_endian") + little + b"s"]
    content = b"".join(PROTO + program + STOP for program in [*programs, value or state(), listed])
    content += b"".join(struct.pack("<q", count) + np.arange(6, dtype="<f4").tobytes() for count in counts) + end
    path.write_bytes(content[:cut])
    return path


def refused(path, match: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=match) as caught:
            legacy_torch.tensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_a_file_written_by_hand_is_read(tmp_path):
    found = legacy_torch.tensors(file(tmp_path))
    assert list(found) == ["kernel"]
    np.testing.assert_array_equal(next(found["kernel"].blocks(1 << 20)), np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize(
    "value, named",
    [
        (state(OSYSTEM + tuple_of(text("touch HERE")) + b"R"), "'os.system'"),
        (b"cbuiltins\neval\n" + tuple_of(text("1")) + b"R", "'builtins.eval'"),
        (tensor(function=b"ctorch._utils\n_rebuild_parameter\n"), "'torch._utils._rebuild_parameter'"),
        (b"(" + text("touch HERE") + b"ios\nsystem\n", "opcode INST"),
        (b"ccollections\nOrderedDict\n)\x81", "opcode NEWOBJ"),
        (text("os") + text("system") + b"\x93", "opcode STACK_GLOBAL"),
        (b"\x82\x01", "opcode EXT1"),
        (b"PX\n", "opcode PERSID"),
        (b"ctorch\nFloatStorage\n)R", "calls 'torch FloatStorage'"),
        (b"ccollections\nOrderedDict\n" + tuple_of(number(1)) + b"R", "calls 'collections OrderedDict'"),
        (text("torch._utils _rebuild_tensor_v2") + b")R", "calls"),
        (b"})R", "calls no function"),
        (b"}Q", "a tuple is wanted"),
        (tuple_of(*map(text, "abcdef")) + b"Q", "not that of a storage"),
        (b"}\x88b", "a dict is wanted"),
        (b"}" + b"N" * 5, "damaged"),
        (b"}(t(u", "damaged"),
        (b"h\x05", "damaged"),
        (b"(" * 5 + b"tttttt", "damaged"),
        (b"\x85", "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_program_that_does_anything_else_is_refused(tmp_path, monkeypatch, value, named):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"{command!r} was run"))
    monkeypatch.chdir(tmp_path)
    refused(file(tmp_path, value), named)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    "value, named",
    [
        (tensor(storage(1 << 62), shape=(1 << 62,), strides=(1,)), "cut short"),
        (tensor(shape=(1 << 40, 1 << 20), strides=(0, 0)), "does not fit"),
        (tensor(shape=(2, 4), strides=(3, 1)), "does not fit"),
        (tensor(start=1), "does not fit"),
        (tensor(start=-1), "negative"),
        (tensor(shape=(2, -3)), "negative"),
        (tensor(strides=(-3, 1)), "negative"),
        (tensor(shape=(6,)), "damaged"),
        (tensor(storage(kind=b"ctorch\nDoubleStorage\n")), "cut short"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_the_file_does_not_hold_are_refused(tmp_path, value, named):
    refused(file(tmp_path, state(value)), named)


def test_deep_keys_and_long_strings_are_refused_at_once(tmp_path):
    doubled = b"".join(b"q\x00h\x00\x86" for _ in range(60))  # as a key, hashed for the lifetime of the universe
    refused(file(tmp_path, state(name=b")" + doubled)), "a str is wanted")
    refused(file(tmp_path, b"X\xff\xff\xff\xff"), "damaged")
    refused(file(tmp_path, b"\x8d" + b"\xff" * 7 + b"\x7f"), "damaged")


def test_a_damaged_file_is_refused_wherever_it_ends(tmp_path):
    whole = len(file(tmp_path).read_bytes())
    for cut in (0, 1, 10, 40, 120, whole - 40, whole - 24, whole - 1):
        refused(file(tmp_path, cut=cut), "damaged|cut short")
    refused(file(tmp_path, end=b"\0"), "1 bytes follow")
    refused(file(tmp_path, counts=(5,)), "has 5 elements, not 6")
    refused(file(tmp_path, keys=("8",)), "list of storages")
    refused(file(tmp_path, keys=("7", "7")), "list of storages")
    refused(file(tmp_path, state(tensor(storage(6)) + b"0" + tensor(storage(5), shape=(5,), strides=(1,)))), "POP")
    refused(file(tmp_path, magic=0x1950A86A20F9469CFC6D), "lacks the magic number")
    refused(file(tmp_path, little=b"\x89"), "big-endian")
    refused(file(tmp_path, b"]" + tensor() + b"a"), "must hold a state dict")
    refused(file(tmp_path, state(number(3)), keys=(), counts=()), "must hold a state dict")
    twice = b"}" + text("a") + tensor() + b"s" + text("b") + tensor(storage(5), shape=(5,), strides=(1,)) + b"s"
    refused(file(tmp_path, twice), "declared in two ways")
