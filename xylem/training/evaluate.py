"""How well a model predicts a text: loss, perplexity and bits per byte; how often it is right, where it judges."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xylem.data import examples, pipeline
from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.generation.sampling import virtual_tokens
from xylem.models import heads, ngram
from xylem.models.config import Seq2SeqConfig
from xylem.models.ngram import NGramConfig
from xylem.training import metrics
from xylem.training.finetune_config import HEADS, room_for
from xylem.training.inputs import tuning_data
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import Sums, causal_lm, next_window
from xylem.training.restore import Model, decodes
from xylem.training.step import eval_step


def figures(sums: Sequence[Sums], counts: dict[str, int] | None) -> dict[str, float]:
    """Mean ``loss`` (nats a token), ``perplexity`` and ``bits_per_byte`` of batches of a split, given their sums.

    ``counts`` are the split's (``Prepared.counts``): bytes are shared out evenly over its labels, so over the whole
    split bits per byte are exact. A document's end-of-text is predicted too: it costs bits and adds no byte. None
    where not every token is predicted from those before it alone: there are no bits per byte then.
    """
    nll, weight = (math.fsum(float(getattr(each, name)) for each in sums) for name in ("nll", "weight"))
    if counts is None:
        return {"loss": nll / weight, "perplexity": metrics.perplexity(nll / weight)}
    bytes_read = counts["bytes"] * weight / (counts["tokens"] - 1)  # the very first token is nobody's label
    return {
        "loss": nll / weight,
        "perplexity": metrics.perplexity(nll / weight),
        "bits_per_byte": metrics.bits_per_byte(nll, bytes_read),
    }


def carried(step: Any, params: Any, batches: Iterable[Any], carry: Any = None) -> Iterator[Sums]:
    """``step(params, batch)`` of each batch in turn, handed what the one before it left; ``carry`` is the first's."""
    for batch in batches:
        sums = step(params, batch if carry is None else {**batch, "carry": carry})
        carry = sums.carry
        yield sums.replace(carry=None)


def counted_figures(config: NGramConfig, tree: ngram.Tree, data: pipeline.Prepared, split: str) -> dict[str, float]:
    """``figures`` of an n-gram model over the whole of a split, and how many ``tokens`` were predicted.

    Each document is scored by itself, so the last one's end counts too, which no window of packed text predicts.
    """
    score = ngram.score(config, tree, data.documents(split))
    counts = {**data.counts[split], "tokens": int(score.weight) + 1}  # each of its tokens is a label
    return {**figures([Sums(score.nll, score.nll, score.weight)], counts), "tokens": score.weight}


def measured(name: str, config: Any, objective: str) -> None:
    """Refuse a model that ``evaluate`` cannot measure."""
    if objective not in HEADS and not (isinstance(config, Seq2SeqConfig) and objective == "answers"):
        decodes(name, config, objective)


def evaluate(model: Model, data: DataConfig, split: str, batch_size: int, limit: int | None) -> dict[str, float]:
    """``figures`` of the first ``limit`` batches of a split, or of all, and how many ``tokens`` were predicted.

    The text is read as the model's objective reads it: one that learned answers is measured on answers, one that judges
    on labels, which gives its ``accuracy`` too. An n-gram model reads whole documents, never windows: the sizes change
    nothing, and there is no ``limit``.

    Raises:
        ConfigError: the corpus or the split does not exist, a size is impossible, or ``data``'s tokenizer is not the
            model's.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", limit, "at least 1 batch is read")
    config = model.module.config
    counts = isinstance(config, NGramConfig)
    most = config.max_length if counts else room_for(config, max(virtual_tokens(model.module, model.params)))
    if data.sequence_length > most:
        raise ConfigError("sequence_length", data.sequence_length, f"the model reads at most {most} tokens")
    own = tuning_data(model.objective, config, data, model.tokenizer, model.labels)
    prepared = pipeline.prepare(data) if own is None else own[0]
    if prepared.tokenizer.hash != model.tokenizer.hash:
        raise ConfigError("data.tokenizer", data.tokenizer, "it is not the one the model was trained with")
    if isinstance(config, NGramConfig):
        if limit is not None:
            raise ConfigError("limit", limit, "an n-gram model scores the whole split, in a second or so")
        return counted_figures(config, model.params, prepared, split)
    if model.objective in HEADS:
        return judged_figures(model, prepared, split, batch_size, limit)
    loss, carry, order = causal_lm, None, "text"
    if model.objective == "truncated":
        loss, carry, order = next_window, model.module.init_cache(batch_size, 0), "consecutive"
        end = prepared.tokenizer.end_of_text
        prepared = dataclasses.replace(prepared, example=partial(examples.next_window, end=end))
    step = jax.jit(partial(eval_step, loss=partial(loss, model.module, ObjectiveConfig())))
    batches = pipeline.eval_batches(prepared, split, batch_size, order=order)
    sums = list(itertools.islice(carried(step, model.params, batches, carry), limit))
    counts = prepared.counts[split] if own is None else None  # not every token of a conversation is predicted
    return {**figures(sums, counts), "tokens": math.fsum(float(each.weight) for each in sums)}


def judged_figures(
    model: Model, data: pipeline.Prepared, split: str, batch_size: int, limit: int | None
) -> dict[str, float]:
    """Mean ``loss`` (nats a label) and ``accuracy`` of a model that judges, on how many ``labels``."""

    @jax.jit
    def step(params: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
        scores = heads.judged(model.module, params, batch)
        chosen = -jnp.take_along_axis(jax.nn.log_softmax(scores), batch["labels"][..., None], axis=-1)[..., 0]
        weights, right = batch["weights"], scores.argmax(-1) == batch["labels"]
        return (chosen * weights).sum(), (right * weights).sum(), weights.sum()

    batches = itertools.islice(pipeline.eval_batches(data, split, batch_size), limit)
    sums = [step(model.params, batch) for batch in batches]
    loss, right, labels = (math.fsum(float(each[place]) for each in sums) for place in range(3))
    return {"loss": loss / labels, "accuracy": right / labels, "labels": labels}
