"""Prepared data that is a list of records in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xylem import files
from xylem.data import corpora, pipeline
from xylem.data.config import DataConfig
from xylem.errors import ConfigError


class Records(list[dict[str, Any]]):
    """A list that is read as TFDS's sources are."""

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [self[row] for row in rows]


@dataclass(frozen=True)
class Listed(pipeline.Prepared):
    """Records in memory, by split, in place of packed text on disk."""

    rows: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    def source(self, split: str) -> Records:
        """Random access to a split, as ``pipeline.Prepared.source``.

        Raises:
            ConfigError: there is no such split.
        """
        if split not in self.rows:
            raise ConfigError("split", split, f"allowed: {', '.join(self.rows)}", self.rows)
        return Records(self.rows[split])

    def _records(self, source: Records, rows: Sequence[int]) -> list[dict[str, Any]]:
        return source.__getitems__(rows)  # made a moment ago: nothing on disk could have damaged them


Read = Callable[[Path, str], list[Any]]


def held_out(config: DataConfig, read: Read, named: Sequence[str] = ()) -> tuple[dict[str, list[Any]], list[str]]:
    """What ``read(path, setting)`` finds in the files of ``config.corpus`` and of ``config.validation``, in whose place
    the last of the others are held out where there are none; and the files' hashes. ``named``: see ``find_files``.

    Raises:
        ConfigError: there is no such file, or nothing is left to learn from.
    """
    found, hashes = all_of("data.corpus", config.corpus, read, named)
    splits = {"train": found}
    if config.validation is not None:
        splits["validation"], more = all_of("data.validation", config.validation, read)
        hashes += more
    else:
        count = max(1, round(len(splits["train"]) * config.validation_fraction))
        splits = {"train": splits["train"][:-count], "validation": splits["train"][-count:]}
    for name, found in splits.items():
        if not found:
            raise ConfigError("data.corpus", config.corpus, f"at least one line for each split; {name} has none")
    return splits, hashes


def all_of(setting: str, pattern: str, read: Read, named: Sequence[str] = ()) -> tuple[list[Any], list[str]]:
    """What ``read(path, setting)`` finds in the files that a pattern names, and their hashes."""
    paths = corpora.find_files(setting, pattern, named)
    return [one for path in paths for one in read(path, setting)], [files.sha256(path) for path in paths]


def as_it_is(record: Mapping[str, Any], rng: Any) -> dict[str, Any]:
    """An example that is its record."""
    return dict(record)
