"""A counting run as one value: what ``training/counting.py`` counts, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xylem.data.config import DataConfig
from xylem.models.ngram import NGramConfig


@dataclass(frozen=True)
class CountingConfig:
    """An n-gram model of a corpus: nothing is trained, everything is counted once.

    Attributes:
        order: n; a token is predicted from the n - 1 before it.
        smoothing: how unseen grams get their share, see ``models.ngram.NGramConfig``.
        discount: Kneser-Ney's, at every order; None estimates one for each.
        base: where Kneser-Ney's recursion ends, in equal shares or in the undiscounted unigrams.
        data: the text and its tokenizer; ``sequence_length`` changes nothing that is counted.
        sample_prompt: what the sample continues.
        run_dir: the run folder.
    """

    order: int = 5
    smoothing: Literal["mle", "laplace", "kneser_ney"] = "kneser_ney"
    discount: float | None = None
    base: Literal["uniform", "unigram"] = "uniform"
    data: DataConfig = field(default_factory=DataConfig)
    sample_prompt: str = "The history of"
    run_dir: str = "runs/ngram"

    def __post_init__(self):
        self.model(vocab_size=1, end_of_text=0)  # says what is wrong before any text is read

    def model(self, vocab_size: int, end_of_text: int) -> NGramConfig:
        """The model's config, with what only the tokenizer knows."""
        return NGramConfig(vocab_size, end_of_text, self.order, self.smoothing, self.discount, self.base)
