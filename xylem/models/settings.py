"""What all configs share: their checks, their way back from JSON, and how a network is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from xylem.errors import ConfigError

T = TypeVar("T")


def check_choices(config: Any) -> None:
    """Raise ConfigError when a field annotated ``Literal[...]`` of a dataclass holds anything else."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            allowed = [str(choice) for choice in get_args(kind)]
            raise ConfigError(name, getattr(config, name), f"it must be one of {', '.join(allowed)}", allowed)


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """A config dataclass from what ``dataclasses.asdict`` made of it, nested ones included."""
    hints = get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ConfigError(kind.__name__, unknown[0], f"its fields are {', '.join(hints)}", hints)

    def build(name: str, value: Any) -> Any:
        nested: list[Any] = [each for each in (hints[name], *get_args(hints[name])) if is_dataclass(each)]
        if not nested or not isinstance(value, Mapping):
            return tuple(value) if get_origin(hints[name]) is tuple else value  # JSON has lists alone
        # Of several classes it is the one of that name, or the smallest that has these fields; what it has besides is
        # younger than the file.
        named = [each for each in nested if "name" in value and getattr(each, "name", None) == value["name"]]
        fitting = [each for each in nested if {one.name for one in fields(each)} >= set(value)]
        return from_dict(min(named or fitting, key=lambda each: len(fields(each)), default=nested[0]), value)

    return kind(**{name: build(name, value) for name, value in values.items()})


def check_sizes(config: Any, *names: str) -> None:
    """Raise ConfigError when a field of these is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(name, getattr(config, name), "it must be at least 1")


@dataclass(frozen=True)
class Compute:
    """How a network is computed, never what it computes.

    Attributes:
        dtype: of activations and matrix products; norms, softmax, logits and losses stay in float32.
        param_dtype: of stored parameters.
        remat: what a layer keeps for the backward pass: ``none`` recomputes nothing, ``dots`` keeps matrix products,
            ``full`` keeps the layer's input only.
        layers: ``scan`` compiles one layer, ``unroll`` all of them (longer compile, faster step);
            ``auto`` takes what was measured fastest for the backend.
        kernels: ``fused`` for the hand-written derivatives of ``fused.py``, ``plain`` for what XLA derives;
            ``auto`` as above.
        scan: how state-space layers run along time, one of the forms of ``selective_scan.py``; ``auto`` as above.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    layers: Literal["auto", "scan", "unroll"] = "auto"
    kernels: Literal["auto", "plain", "fused"] = "auto"
    scan: Literal["auto", "sequential", "parallel", "chunked", "kernel"] = "auto"

    def __post_init__(self):
        check_choices(self)
