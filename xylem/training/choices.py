"""Held-out conversations judged: how likely the answers are, and how often the right one of a few is preferred."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from xylem.data import pipeline
from xylem.data.listed import Listed
from xylem.models.language_model import LanguageModel
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import Sums, cross_entropy, forward

ROUND = 16  # answers a row are padded to a multiple of this: one program for most data


def judge(module: LanguageModel, params: Any, data: Listed, batch_size: int) -> dict[str, float]:
    """``loss`` (nats a token of an answer) and ``accuracy`` on the held-out conversations, and how many ``answers``.

    What can be chosen is what an answer of the training conversations begins with. The choice of a model is the
    likeliest of these tokens behind the question; so letters, or words that begin apart, are judged without writing.
    """
    choices = np.zeros(module.config.vocab_size, bool)
    for row in data.rows["train"]:
        choices[row["labels"][begins(row)]] = True
    most = max(int(begins(row).sum()) for row in data.rows["validation"])
    places = -(-most // ROUND) * ROUND
    found = []
    for batch in pipeline.eval_batches(data, "validation", batch_size):
        starts = np.stack([_padded(begins(row), places) for row in _rows(batch)])
        found.append(_judged(module, params, batch, starts, choices))
    total = [math.fsum(float(each) for each in column) for column in zip(*found, strict=True)]
    nll, tokens, right, answers = total
    return {"loss": nll / tokens, "accuracy": right / answers, "answers": answers}


def begins(row: dict[str, Any]) -> Bool[np.ndarray, " T"]:
    """Where an answer's first token is the label: one that counts behind one that does not."""
    counts = np.asarray(row["weights"]) > 0
    return counts & ~np.insert(counts[:-1], 0, False)


def _rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: x[index] for name, x in batch.items()} for index in range(len(batch["tokens"]))]


def _padded(marks: Bool[np.ndarray, " T"], places: int) -> Int[np.ndarray, " N"]:
    """The places that are marked, and -1."""
    at = np.flatnonzero(marks)
    return np.pad(at, (0, places - len(at)), constant_values=-1)


@partial(jax.jit, static_argnums=0)
def _judged(
    module: LanguageModel, params: Any, batch: dict[str, Array], starts: Int[Array, "B N"], choices: Bool[Array, " V"]
) -> tuple[Array, Array, Array, Array]:
    """Sums over a batch: nats, tokens they are of, right choices, choices."""
    hidden = forward(module, params, batch, None).hidden
    sums: Sums = cross_entropy(module, ObjectiveConfig(), params, batch, hidden)
    real, at = starts >= 0, jnp.maximum(starts, 0)
    logits = module.head(module.head_params(params), jnp.take_along_axis(hidden, at[..., None], axis=1))
    chosen = jnp.where(choices, logits, -jnp.inf).argmax(-1)
    right = (chosen == jnp.take_along_axis(batch["labels"], at, axis=1)) & real
    return sums.nll, sums.weight, right.sum(), real.sum()
