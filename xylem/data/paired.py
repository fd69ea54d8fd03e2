"""A prepared corpus read as pairs of segments, for BERT's and ALBERT's second objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from xylem.data import pairs, pipeline
from xylem.data.listed import Records
from xylem.errors import ConfigError


@dataclass(frozen=True)
class PreparedPairs(pipeline.Prepared):
    """A corpus whose records are pairs in place of packed windows: all of them in memory, made anew in seconds.

    Attributes:
        kind: ``next_sentence`` (BERT) or ``sentence_order`` (ALBERT).
        cls, sep: ids of [CLS] and [SEP], which may lie beyond the tokenizer's.
        seed: of what is drawn: which pairs there are differs from seed to seed, not from epoch to epoch, as with BERT's
            and ALBERT's own builders.
    """

    kind: Literal["next_sentence", "sentence_order"] = "next_sentence"
    cls: int = 0
    sep: int = 0
    seed: int = 0

    @cached_property
    def _sources(self) -> dict[str, Records]:
        return {}

    def source(self, split: str) -> Records:
        """Random access to a split, as ``pipeline.Prepared.source``; records are those of ``pairs.records``.

        Raises:
            ConfigError: no such split, or one that holds too little for a pair.
        """
        if split not in self._sources:
            self._sources[split] = Records(pairs.records(self._pairs(split), self.config.sequence_length, self.sep))
        return self._sources[split]

    def _pairs(self, split: str) -> list[pairs.Pair]:
        packed = pipeline.Prepared(**self.parts())
        texts = [self.tokenizer.decode(ids) for ids in packed.documents(split)]
        cut = [[one for one in pairs.sentences(text) if one.strip()] for text in texts]
        ids = iter(self.tokenizer.encode_batch([one for text in cut for one in text]))
        documents = [[next(ids) for _ in text] for text in cut if text]
        settings = (self.config.sequence_length, self.cls, self.sep)
        if self.kind == "next_sentence":
            made = pairs.next_sentence_corpus(documents, pairs.chance(self.seed, 0, 0), *settings)
        else:
            chances = [pairs.chance(self.seed, 0, index) for index in range(len(documents))]
            each = zip(documents, chances, strict=True)
            made = [pair for document, rng in each for pair in pairs.sentence_order_pairs(document, rng, *settings)]
        if not made:
            raise ConfigError("data.corpus", self.corpus.name, f"its {split} split has no two sentences in a row")
        return made

    def _records(self, source: Records, rows: Sequence[int]) -> list[dict[str, Any]]:
        return source.__getitems__(rows)  # made a moment ago: nothing on disk could have damaged them


def paired(prepared: pipeline.Prepared, **own: Any) -> PreparedPairs:
    """The pairs of a prepared corpus; ``own`` are the attributes of ``PreparedPairs``."""
    return PreparedPairs(**prepared.parts(), **own)
