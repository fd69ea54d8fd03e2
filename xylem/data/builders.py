"""The TFDS dataset of packed windows. TFDS writes and reads ArrayRecord without TensorFlow.

This module imports tensorflow_datasets: import it where a dataset is built, not where flags are parsed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from xylem import files
from xylem.data import progress
from xylem.data.corpora import Corpus
from xylem.data.packing import pack
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError


class PackedText(tfds.core.GeneratorBasedBuilder):
    """Windows of ``sequence_length + 1`` tokens over a corpus, in the order of its text (see ``packing``).

    Features ``tokens`` and ``segments`` are int32 (T+1,). The dataset's metadata holds the tokenizer's hash and, by
    split, the documents, the bytes of their text, the tokens of the stream (end-of-text included) and the windows.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Tokens and segments of windows that share one token with the next."}  # noqa: RUF012
    # TFDS finds this out by itself only with importlib_resources, which it does not install.
    code_path = epath.Path(__file__)

    def __init__(
        self, *, corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, report: files.Report, **options: Any
    ):
        """Say what to build; ``download_and_prepare()`` builds it under ``options["data_dir"]``."""
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._length = sequence_length
        self._report = report
        self.counts: dict[str, dict[str, int]] = {}
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        window = tfds.features.Tensor(shape=(self._length + 1,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self._corpus.description} Packed into windows of {self._length} + 1 tokens.",
            features=tfds.features.FeaturesDict({"tokens": window, "segments": window}),
            license=self._corpus.license or None,
            citation=self._corpus.citation,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                tokenizer_hash=self._tokenizer.hash,
                corpus_identity=self._corpus.identity,
                sequence_length=self._length,
                splits=self.counts,
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
        return {split: self._generate_examples(split) for split in self._corpus.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        counts = {"documents": 0, "bytes": 0, "tokens": 0, "windows": 0}
        with progress.stage(f"packing {self._corpus.name} {split}", self._report) as advance:

            def texts() -> Iterator[str]:
                for text in self._corpus.splits[split]():
                    if text:
                        counts["documents"] += 1
                        counts["bytes"] += len(text.encode())
                        yield text
                        advance(1)

            def ids() -> Iterator[np.ndarray]:
                for document in self._tokenizer.encode_documents(texts()):
                    counts["tokens"] += len(document) + 1
                    yield document

            for tokens, segments in pack(ids(), self._length, self._tokenizer.end_of_text):
                for row, of_row in zip(tokens, segments, strict=True):
                    yield counts["windows"], {"tokens": row, "segments": of_row}
                    counts["windows"] += 1
        self._check(split, counts)
        self.counts[split] = counts

    def _check(self, split: str, counts: dict[str, int]) -> None:
        if counts["tokens"] < 2:
            raise ConfigError("data.corpus", self._corpus.name, f"its {split} split is empty: it has no text")
        # Padding is for the end of a long text; a train split that is mostly padding is a mistake.
        if split == "train" and counts["tokens"] <= self._length:
            allowed = f"the train split of {self._corpus.name} has only {counts['tokens']} tokens: less than a window"
            raise ConfigError("data.sequence_length", self._length, allowed)

    def _log_download_bytes(self) -> None:
        """Nothing: ``report`` tells the progress."""

    def _log_download_done(self) -> None:
        """Nothing: ``report`` tells the progress."""
