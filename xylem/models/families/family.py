"""What reading and writing a family needs; a stranger's configuration is checked field by field, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xylem.errors import ConfigError
from xylem.models.conversion import Row

REQUIRED = object()
FLOAT32_MAX = 3.4028235e38


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is stored.

    Attributes:
        architecture: the class of transformers that is its language model.
        prefix: before every tensor's name but those ``outside``; files of the bare network leave it out.
        outside: names of the heads' tensors.
        rows: the table of its tensors, or what gives it for a configuration.
        ignored: tensors that hold nothing of their own: masks and frequencies which old releases stored, a tied head.
        optional: parts of our tree that a file may lack, each as a whole: heads that it was saved without.
        to_config: ``config.json`` -> configuration; ``holds_head`` is added to it, whether the file has lm_head.weight.
        from_config: the other way; what it cannot express shows when its result is read back.
        heads: transformers' classes of a network with a head of ``models/heads.py``, by its kind.
    """

    architecture: str
    prefix: str
    outside: re.Pattern[str]
    rows: tuple[Row, ...] | Callable[[Any], tuple[Row, ...]]
    ignored: re.Pattern[str]
    to_config: Callable[[Mapping[str, Any]], Any]
    from_config: Callable[[Any], dict[str, Any]]
    optional: tuple[str, ...] = ()
    heads: Mapping[str, str] = field(default_factory=dict)

    def table(self, config: Any) -> tuple[Row, ...]:
        """The rows of a configuration."""
        return self.rows(config) if callable(self.rows) else self.rows

    def outer(self, name: str) -> str:
        """The full name of a tensor of the table."""
        return name if self.outside.fullmatch(name) else self.prefix + name


# --- reading a stranger's configuration ------------------------------------------------------------------------------


def value(raw: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED) -> Any:
    """One field, of type ``kind``; ``default`` where it is absent or null."""
    found = raw.get(key)
    if found is None:
        if default is REQUIRED:
            raise ConfigError(key, None, "the checkpoint's configuration must give it")
        return default
    kinds = (int, float) if kind is float else kind
    if not isinstance(found, kinds) or (isinstance(found, bool) and kind is not bool):
        raise ConfigError(key, found, f"it must be of type {kind.__name__}")
    if kind is float and not abs(found) < FLOAT32_MAX:  # NaN and infinity too: Python's JSON reads them
        raise ConfigError(key, found, "it must be a finite float32")
    return kind(found)


def size(raw: Mapping[str, Any], key: str, default: Any = REQUIRED) -> int:
    """A count from 1 to what an int32 holds."""
    found = value(raw, key, int, default)
    if not 1 <= found < 2**31:
        raise ConfigError(key, found, "it must lie between 1 and 2^31 - 1")
    return found


def choice(raw: Mapping[str, Any], key: str, table: Mapping[str, str], default: str) -> str:
    """Our word for one of theirs."""
    found = value(raw, key, str, default)
    if found not in table:
        raise ConfigError(key, found, f"it must be one of {', '.join(table)}", table)
    return table[found]


def spelled(table: Mapping[str, str], ours: str) -> str:
    """Their first word for one of ours; ours where they have none, which reading back refuses."""
    return next((theirs for theirs, word in table.items() if word == ours), ours)


def require(raw: Mapping[str, Any], family: str, allowed: Mapping[str, Any]) -> None:
    """Refuse settings that the networks here do not implement; each may be absent."""
    for key, only in allowed.items():
        if raw.get(key, only) not in (only, None):
            raise ConfigError(key, raw[key], f"{family} is implemented for {only!r} only")


def head_width(heads: int, d_model: int, key: str) -> int:
    """The width of one head when the heads share the model's."""
    if d_model % heads:
        raise ConfigError(key, heads, f"it must divide the model's width {d_model}")
    return d_model // heads


def linear(theirs: str, ours: str) -> tuple[Row, Row]:
    """Weight and bias of a ``torch.nn.Linear``."""
    return Row(f"{theirs}.weight", (f"{ours}/kernel",), transposed=True), Row(f"{theirs}.bias", (f"{ours}/bias",))


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """Weight and bias of a ``torch.nn.LayerNorm``."""
    return Row(f"{theirs}.weight", (f"{ours}/scale",)), Row(f"{theirs}.bias", (f"{ours}/bias",))


# transformers, activations.py. Several of its words mean one function; the first is the one we write.
ACTIVATIONS = {
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"},
    **{"silu": "silu", "swish": "silu"},
}


def one_rate(raw: Mapping[str, Any], keys: tuple[str, ...], family: str, default: float) -> float:
    """The dropout rate that all ``keys`` give."""
    rates = {key: value(raw, key, float, default) for key in keys}
    if len(set(rates.values())) > 1:
        raise ConfigError("dropout", rates, f"{family} is implemented with one rate for all of them")
    return rates[keys[0]]
