"""What text to read, how to cut it into tokens, and where prepared data is kept."""

import os
from dataclasses import dataclass
from pathlib import Path

from xylem.errors import ConfigError

# 256 bytes and the end-of-text token: a byte-level vocabulary cannot be smaller.
SMALLEST_BPE = 257
TOKENIZER_NAMES = ("bytes", "characters", "bpe:4096")
TOKENIZER_FORMS = "allowed: bytes, characters, bpe:SIZE, or the path of a tokenizer.json, of its folder, or of a .gguf"


def cache_root(cache_dir: str | None = None) -> Path:
    """The folder of everything prepared: ``cache_dir``, else ``$XYLEM_CACHE``, else ``~/.cache/xylem``."""
    return Path(cache_dir or os.environ.get("XYLEM_CACHE") or "~/.cache/xylem").expanduser()


def bpe_size(tokenizer: str) -> int | None:
    """The vocabulary size that ``bpe:SIZE`` asks for, or None where ``tokenizer`` has another form."""
    if not tokenizer.startswith("bpe:"):
        return None
    size = tokenizer.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit()) or int(size) < SMALLEST_BPE:
        allowed = f"SIZE in bpe:SIZE is a whole number, at least {SMALLEST_BPE} (256 bytes and end-of-text)"
        raise ConfigError("data.tokenizer", tokenizer, allowed)
    return int(size)


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and window length; every field changes what ``pipeline.prepare`` returns, except ``cache_dir``.

    Attributes:
        corpus: ``wikitext2``; or a file, folder or glob of ``.txt`` (one document a file) and ``.jsonl`` (one a line);
            or ``tfds:NAME[/CONFIG][:FEATURE]``, a registered TFDS builder with a text feature. Conversations and
            labelled texts are ``.jsonl`` files, or a set by its name (``conversations.NAMED``; ``trec``).
        validation: files that replace the corpus's own validation split (same forms as files in ``corpus``).
        tokenizer: ``bytes``, ``characters``, ``bpe:SIZE`` (trained on the train split), or a path that
            ``tokenizers.load`` reads.
        sequence_length: tokens a row of a batch has.
        validation_fraction: where a corpus has no validation split, its last documents become one: this fraction of
            their number, at least one. A corpus of one document is cut at that fraction of its characters instead
            (0.1 gives nanoGPT's 90/10). The order of documents is that of sorted paths, then lines: nothing is drawn.
        text_field: the key that holds the text in each JSONL line.
        manual_dir: the folder a TFDS builder reads files from when they cannot be downloaded.
        builder_module: a Python module imported first, so that the TFDS builder it defines is registered.
        cache_dir: see ``cache_root``.

    Raises:
        ConfigError: a value that cannot work.
    """

    corpus: str = "wikitext2"
    validation: str | None = None
    tokenizer: str = "bpe:4096"
    sequence_length: int = 256
    validation_fraction: float = 0.1
    text_field: str = "text"
    manual_dir: str | None = None
    builder_module: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.corpus or self.corpus == "tfds:":
            raise ConfigError("data.corpus", self.corpus, "allowed: wikitext2, files, or tfds:NAME[/CONFIG][:FEATURE]")
        if not self.tokenizer:
            raise ConfigError("data.tokenizer", self.tokenizer, TOKENIZER_FORMS)
        bpe_size(self.tokenizer)
        if self.sequence_length < 1:
            raise ConfigError("data.sequence_length", self.sequence_length, "a whole number of tokens, at least 1")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError("data.validation_fraction", self.validation_fraction, "a fraction between 0 and 1")
        if not self.text_field:
            raise ConfigError("data.text_field", self.text_field, "the name of the key that holds the text")
