"""A random n-gram model's config and documents."""

import numpy as np

from xylem.models.ngram import NGramConfig

SMOOTHINGS = ("mle", "laplace", "kneser_ney")


def draw_case(rng, smoothing, order):
    """A config, documents that leave a token of the vocabulary out and one document empty, and others to score."""
    vocab = int(rng.integers(9, 16))
    values = {"discount": float(rng.uniform(0.05, 0.95)), "base": "unigram"} if smoothing == "kneser_ney" else {}
    end, unseen = (int(x) for x in rng.choice(vocab, 2, replace=False))
    config = NGramConfig(vocab, end, order, smoothing, **values)
    words = np.setdiff1d(np.arange(vocab), [end, unseen])
    draw = lambda length: rng.choice(words, length, p=rng.dirichlet(np.ones(len(words))))  # noqa: E731
    documents = [words, draw(0), *(draw(int(length)) for length in rng.integers(1, 40, 6))]
    return config, documents, [draw(23), draw(14)]
