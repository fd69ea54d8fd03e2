"""What a run's objective reads: the prepared corpus, its records turned into that objective's examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from xylem.data import conversations, corruption, denoising, examples, labelled, masking, tagged
from xylem.data.config import DataConfig
from xylem.data.examples import MakeExample
from xylem.data.labelled import TokenTypes
from xylem.data.mixture import mixed
from xylem.data.paired import paired
from xylem.data.pipeline import Prepared
from xylem.data.tokenizers import Tokenizer
from xylem.models.config import ModelConfig, Seq2SeqConfig, TransformerConfig
from xylem.models.ngram import NGramConfig
from xylem.training.config import RunConfig, special_ids
from xylem.training.objective_config import DenoisingConfig, MaskedConfig, SampledConfig, SpanConfig


class Ids(NamedTuple):
    """What an objective must know of a vocabulary.

    Attributes:
        size: ordinary and special ids are below it.
        end: the token between documents, which ends sources and targets too.
        special: those of ``special_ids``.
        stops: tokens that end a sentence.
    """

    size: int
    end: int
    special: dict[str, int]
    stops: list[int]


def objective_data(config: RunConfig, data: Prepared) -> Prepared:
    """The corpus as ``config.objective`` reads it: batches of it are that objective's."""
    tokenizer, special = data.tokenizer, special_ids(config, data.tokenizer)
    size = max(tokenizer.vocab_size, *(token + 1 for token in special.values()), 0)
    stops = full_stops(tokenizer) if isinstance(config.objective, DenoisingConfig) else []
    data = replace(data, example=maker(config, Ids(size, tokenizer.end_of_text, special, stops)))
    if isinstance(config.objective, MaskedConfig) and config.objective.pairs != "none":
        own = {"kind": config.objective.pairs, "cls": special["cls"], "sep": special["sep"], "seed": config.seed}
        return paired(data, **own)
    if isinstance(config.objective, SpanConfig) and config.objective.tasks:
        return mixed(data, config.objective.tasks, config.objective.mixing_limit)
    return data


def tuning_data(
    objective: str, model: ModelConfig | NGramConfig, data: DataConfig, tokenizer: Tokenizer, labels: Sequence[str] = ()
) -> tuple[Prepared, list[str]] | None:
    """What an objective of fine-tuning alone reads, and the names of the labels in it; None for all other objectives.

    ``labels`` are the names that a model has learned already, if it has.
    """
    if objective == "answers":
        if isinstance(model, Seq2SeqConfig):
            return conversations.prepare_pairs(data, tokenizer, model.decoder_start), []
        return conversations.prepare(data, tokenizer), []
    readers = {"classification": labelled.prepare, "token_classification": tagged.prepare}
    if objective not in readers:
        return None
    return readers[objective](data, tokenizer, token_types_of(model), labels)


def token_types_of(model: ModelConfig | NGramConfig) -> TokenTypes:
    """Whether the rows of a model that judges texts have ``token_types``."""
    typed = isinstance(model, TransformerConfig) and model.embedding.token_types == 2
    return "present" if typed else "absent"


def maker(config: RunConfig, ids: Ids) -> MakeExample:
    """The function that makes an objective's examples."""
    objective, model = config.objective, config.model
    length = config.data.sequence_length
    if isinstance(objective, MaskedConfig):
        special = {ids.end, *ids.special.values()}
        settings = {"masked": objective.masked, "random": objective.random, "max_ngram": objective.max_ngram}
        bound = {"special": special, "mask_id": ids.special["mask"], "vocab_size": ids.size, "rate": objective.rate}
        hide = partial(masking.mask_tokens, **bound, **settings)
        return partial(examples.hidden_tokens, hide=hide, most=max(1, corruption.share(length, objective.rate)))
    if objective.name == "truncated":
        return partial(examples.next_window, end=ids.end)
    if not isinstance(model, Seq2SeqConfig):
        return examples.next_token
    sides = {"start": model.decoder_start, "end": ids.end}
    if isinstance(objective, SpanConfig):
        names = ("noise_density", "mean_span", "sentinels", "target_length")
        spans = {name: getattr(objective, name) for name in names}
        window = partial(examples.corrupted_spans, vocab_size=model.vocab_size, **sides, **spans)
        task = partial(examples.text_to_text, sizes=objective.sizes(length), **sides)
        return partial(examples.mixed, window=window, task=task)
    if isinstance(objective, DenoisingConfig):
        noise = denoising.bart(ids.special["mask"], ids.stops, objective.rate, objective.mean_span)
        return partial(examples.denoised, noise=noise, **sides)
    return partial(examples.continued, start=model.decoder_start)


def full_stops(tokenizer: Tokenizer) -> list[int]:
    """The tokens whose text ends with a full stop."""
    return [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).rstrip().endswith(".")]


def example_shapes(config: RunConfig) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of one example, with no corpus at hand."""
    length = config.data.sequence_length
    if config.objective.name == "answers" and isinstance(config.model, Seq2SeqConfig):
        text = np.zeros(length, np.int32)
        pair = examples.source_and_target(text, text, config.model.decoder_start, length, length)
        return {name: (x.shape, x.dtype) for name, x in pair.items()}
    record = {"tokens": np.zeros(length + 1, np.int32), "segments": np.zeros(length + 1, np.int32)}
    ids = Ids(config.model.vocab_size, 0, {"mask": 1, "cls": 2, "sep": 3}, [])
    if isinstance(config.objective, MaskedConfig) and config.objective.pairs != "none":
        record |= {"token_types": np.zeros(length, np.int32), "pair_labels": np.zeros((), np.int32)}
    made = maker(config, ids)(record, corruption.generator(0, 0, 0))
    return {name: (x.shape, x.dtype) for name, x in made.items()}


def train_flops_per_token(config: RunConfig) -> float:
    """Operations of one training step for each token of text that it reads (see the models' methods of that name)."""
    model, shapes = config.model, example_shapes(config)
    length, predicted = config.data.sequence_length, shapes["labels"][0][0]
    if isinstance(model, Seq2SeqConfig):
        return model.train_flops(shapes["tokens"][0][0], predicted) / length
    if isinstance(config.objective, MaskedConfig) and isinstance(model, TransformerConfig):
        return model.train_flops_per_token(length, predicted / length)
    flops = model.train_flops_per_token(length)
    # A forward pass, a third of a step, draws the tokens that are shown.
    return flops * 4 / 3 if isinstance(config.objective, SampledConfig) else flops
