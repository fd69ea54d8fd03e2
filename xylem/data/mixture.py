"""Tasks mixed with a corpus: text to text, all by one model (T5, 1910.10683, sections 2.3 and 3.5.2)."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from xylem import files
from xylem.data import corpora, corruption, pipeline, spans
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError

Record = dict[str, Any]  # ``tokens`` of the input behind its task's name, ``targets``: ids, with no end

_BLOCK = 4096  # places whose draws are made together
_DRAWS = 2**64 - 1  # in place of an epoch: no window is ever read so often, and what it draws never meets these


@dataclass(frozen=True)
class Mixture(pipeline.Prepared):
    """A corpus and tasks: at each place of the order of training stands a window of the one or an example of another.

    The draws are independent, with the probabilities of ``rates``; each part is read in an order of its own, a fresh
    permutation each epoch. Rows of the train split are the windows of the corpus and, behind them, the tasks' examples.
    The other splits are the corpus's.

    Attributes:
        tasks: the examples of each task, by name.
        limit: K, the number of examples above which a part counts no more.
    """

    tasks: dict[str, list[Record]] = field(default_factory=dict)
    limit: int = 2**16

    @property
    def rates(self) -> Float64[np.ndarray, " N"]:
        """The probability of each part, the corpus first (examples-proportional mixing, section 3.5.2)."""
        return spans.mixing_rates(self._sizes, float(self.limit))

    @property
    def _sizes(self) -> list[int]:
        return [self.counts["train"]["windows"], *map(len, self.tasks.values())]

    def source(self, split: str) -> Any:
        """As ``pipeline.Prepared.source``; a record of a task has ``targets``, one of the corpus has none."""
        packed = super().source(split)
        return _Rows(packed, [one for task in self.tasks.values() for one in task]) if split == "train" else packed

    def order(self, seed: int) -> Callable[[int], tuple[int, int]]:
        """As ``pipeline.Prepared.order``: a function of seed and place, which knows nothing of hosts or restarts."""
        import grain

        sizes = self._sizes
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        rows: Any = [grain.MapDataset.range(n).seed((seed + i) % 2**32).shuffle().repeat() for i, n in enumerate(sizes)]
        turns = _turns(self.rates, seed)

        def at(place: int) -> tuple[int, int]:
            part, turn = turns(place)
            return starts[part] + rows[part][turn], turn // sizes[part]

        return at


def mixed(prepared: pipeline.Prepared, tasks: Mapping[str, str], limit: int) -> Mixture:
    """A prepared corpus mixed with tasks, whose examples are read from files and kept in memory as ids.

    Args:
        prepared: the corpus; ``example`` takes records of both kinds (``examples.mixed``).
        tasks: by name, a file of one ``{"input": ..., "target": ...}`` a line. The name is the prefix of the inputs.
        limit: see ``Mixture``.

    Raises:
        ConfigError: a file that cannot be read or has no example, a line that is none; the message names file, line and
            field.
    """
    read = {name: read_task(name, Path(file), prepared.tokenizer) for name, file in tasks.items()}
    contents = [[name, files.sha256(Path(file))] for name, file in tasks.items()]
    key = hashlib.sha256(json.dumps([prepared.key, contents, limit]).encode()).hexdigest()[:16]
    own: dict[str, Any] = prepared.parts() | {"key": key}
    return Mixture(**own, tasks=read, limit=limit)


def read_task(name: str, file: Path, tokenizer: Tokenizer) -> list[Record]:
    """The examples of one task (see ``mixed``)."""
    setting, inputs, targets = f"objective.tasks.{name}", [], []
    for where, record in corpora.json_lines(file, setting):
        for own, texts in (("input", inputs), ("target", targets)):
            text = record.get(own)
            if not isinstance(text, str) or not text:
                raise ConfigError(setting, where, f'its "{own}" is a text that is not empty; it is {text!r}')
            texts.append(corpora.checked_unicode(text, where, setting))
    if not inputs:
        raise ConfigError(setting, str(file), 'a file with at least one line of {"input": ..., "target": ...}')
    prefixed = tokenizer.encode_batch([spans.task_input(name, text) for text in inputs])
    pairs = zip(prefixed, tokenizer.encode_batch(targets), strict=True)
    return [{"tokens": tokens, "targets": target} for tokens, target in pairs]


def _turns(rates: Float64[np.ndarray, " N"], seed: int) -> Callable[[int], tuple[int, int]]:
    """Which of N parts stands at a place, and how many places before it the same part has."""
    before = [np.zeros(len(rates), np.int64)]  # by block, how often each part stands before it

    @lru_cache(maxsize=2)
    def block(number: int) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, "B N"]]:
        drawn = corruption.generator(seed, _DRAWS, number).choice(len(rates), _BLOCK, p=rates)
        return drawn, np.cumsum(drawn[:, None] == np.arange(len(rates)), axis=0)

    def turn(place: int) -> tuple[int, int]:
        number, offset = divmod(place, _BLOCK)
        while len(before) <= number:
            before.append(before[-1] + block(len(before) - 1)[1][-1])
        drawn, seen = block(number)
        part = int(drawn[offset])
        return part, int(before[number][part] + seen[offset, part]) - 1

    return turn


class _Rows:
    """Windows, and examples behind them, read as TFDS's sources are."""

    def __init__(self, windows: Any, examples: list[Record]):
        self.windows, self.examples = windows, examples

    def __len__(self) -> int:
        return len(self.windows) + len(self.examples)

    def __getitems__(self, rows: Sequence[int]) -> list[Mapping[str, Any]]:
        count = len(self.windows)
        read = iter(self.windows.__getitems__([row for row in rows if row < count]))
        return [next(read) if row < count else self.examples[row - count] for row in rows]
