"""What an equation of a traced program tells of the code that it came from."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.source_info_util import summarize

HERE, PACKAGE = str(Path(__file__).parent), str(Path(__file__).parents[1])
RESHAPING = {
    *("reshape", "broadcast_in_dim", "transpose", "squeeze", "expand_dims", "slice", "split", "copy"),
    *("convert_element_type", "stop_gradient"),
}
SYMBOLS = {"add": "+", "mul": "×", "sub": "−", "neg": "−", "logistic": "σ", "dot_general": "@"}  # noqa: RUF001


class Frame(NamedTuple):
    """Where in this package an equation came through."""

    file: str
    line: int
    column: int
    function: str


_FRAME = re.compile(r"(?P<file>.*?):(?P<line>\d+)(?::(?P<column>\d+))? \((?P<function>.*)\)")


def frames(equation: Any) -> list[Frame]:
    """The calls within this package that led to an equation, the outermost first."""
    lines = summarize(equation.source_info, num_frames=200).splitlines()
    found = [_FRAME.fullmatch(line) for line in lines if _is_ours(line)]
    return [
        Frame(one["file"], int(one["line"]), int(one["column"] or 0), one["function"].partition(".<locals>")[0])
        for one in found
        if one and "<locals>.<lambda>" not in one["function"]
    ]


def _is_ours(file: str) -> bool:
    return file.startswith(PACKAGE) and not file.startswith(HERE)


def bodies(equation: Any) -> list[Any]:
    """The programs that an equation runs: those of a scan, a conditional, a function."""
    values = [one for value in equation.params.values() for one in (value if isinstance(value, tuple) else [value])]
    return [getattr(value, "jaxpr", value) for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]


def is_call(frame: Frame) -> bool:
    """Whether a frame is that of a module."""
    return frame.function.endswith("__call__")


def callers(found: set[str]) -> Callable[..., Any]:
    """An interceptor of module calls (flax) that adds to ``found`` every function of this package they come through."""

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        frame = sys._getframe(1)
        while frame is not None:
            if _is_ours(frame.f_code.co_filename):
                found.add(frame.f_code.co_qualname.partition(".<locals>")[0])
            frame = frame.f_back
        return call(*args, **kwargs)

    return note


@cache
def _assignments(file: str) -> list[ast.Assign]:
    return [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Assign)]


def assigned(frame: Frame) -> str:
    """The variable that the statement of a frame gives a value to; empty where there is not just one."""
    for node in _assignments(frame.file):
        if node.lineno <= frame.line <= (node.end_lineno or node.lineno) and isinstance(node.targets[0], ast.Name):
            return node.targets[0].id
    return ""


def parted(frame: Frame) -> list[str]:
    """The variables that a call at a frame is unpacked to, as ``a, b`` of ``a, b = split(x)``."""
    for node in _assignments(frame.file):
        if not (node.lineno <= frame.line <= (node.end_lineno or node.lineno)):
            continue
        target, value = node.targets[0], node.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        for names, call in pairs:
            if call.col_offset == frame.column and isinstance(names, ast.Tuple):
                return [name.id for name in names.elts if isinstance(name, ast.Name)]
    return []


def within(path: list[Frame], outside: list[Frame]) -> list[Frame]:
    """The frames of a path that lie further in than others; jax may leave the outer ones of a scan's body out."""
    return path[len(outside) :] if path[: len(outside)] == outside else path


def common(one: list[Frame], other: list[Frame]) -> list[Frame]:
    """The frames that two paths begin with, by function; lines are the first path's."""
    count = 0
    while count < min(len(one), len(other)) and one[count].function == other[count].function:
        count += 1
    return one[:count]


def operation(equation: Any) -> str:
    """The symbol of an operation; a named function of jax's own begins with =."""
    name = equation.params.get("name", "") if bodies(equation) else ""
    if name and not name.startswith("_"):
        return f"={name}"
    literal = next((v.val for v in equation.invars if hasattr(v, "val") and jnp.ndim(v.val) == 0), None)
    symbol = SYMBOLS.get(equation.primitive.name, str(equation.primitive.name))
    if literal is None or len(equation.invars) != 2:
        return symbol
    return f"{float(literal):.3g} {symbol}" if hasattr(equation.invars[0], "val") else f"{symbol} {float(literal):.3g}"
