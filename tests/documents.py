"""Small texts that the data tests share."""

import json

import numpy as np

LENGTH = 13


def silent(_: str) -> None:
    """A report nobody reads."""


def documents_of(seed, count=60):
    rng = np.random.default_rng(seed)
    words = np.array(["tree", "xylem", "über", "42", "☃", "\n", "sap", "a,"])
    return [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def rows_of(batches, count):
    return np.concatenate([next(batches)["tokens"] for _ in range(count)])
