"""One small corpus, prepared once a module."""

import pytest
from documents import LENGTH, documents_of, silent, write_jsonl

from xylem.data import pipeline
from xylem.data.config import DataConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 documents as JSONL, and the cache that their prepared forms share."""
    folder = tmp_path_factory.mktemp("corpus")
    return write_jsonl(folder / "a.jsonl", documents_of(7)), str(folder / "cache")


@pytest.fixture(scope="module")
def prepared(corpus):
    file, cache = corpus
    config = DataConfig(corpus=file, tokenizer="bpe:300", sequence_length=LENGTH, cache_dir=cache)
    return pipeline.prepare(config, silent)
