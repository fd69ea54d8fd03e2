"""Fine-tuning: the loop of pretraining, begun with a base that a method is grafted onto."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from xylem.data import conversations, labelled
from xylem.data.pipeline import Prepared
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError
from xylem.models import heads
from xylem.models.config import TransformerConfig
from xylem.models.language_model import LanguageModel
from xylem.peft import saving
from xylem.peft.calls import METHODS
from xylem.peft.config import ChildConfig, ReLoRAConfig
from xylem.peft.methods import relora
from xylem.training.checkpoint import load_params
from xylem.training.finetune_config import FinetuneConfig
from xylem.training.loop import corpus_of, train
from xylem.training.program import Start, assemble

ADAPTER = "adapter"  # in the run folder, at its end


def finetune(config: FinetuneConfig, params: Any, tokenizer: Tokenizer, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune ``params`` as ``config`` says, or go on with what its run folder holds; returns the final figures.

    The run folder is that of pretraining; its checkpoints hold what is learned, not the base, and ``adapter/`` is it as
    a file of its own (``peft.saving``).
    """
    labels: list[str] = []
    if config.objective.name == "answers":
        data: Prepared = conversations.prepare(config.data, tokenizer)
    elif config.objective.name == "classification":
        typed = isinstance(config.model, TransformerConfig) and config.model.embedding.token_types == 2
        data, labels = labelled.prepare(config.data, tokenizer, "present" if typed else "absent")
    else:
        data = corpus_of(config)
    config = replace(config, base_hash=saving.fingerprint(params))
    begin = start_of(config, params, len(labels))
    summary = train(config, partial(assemble, config, begin=begin), lambda _: data, argv)
    if summary["step"] == config.steps and jax.process_index() == 0:
        held, _ = load_params(config.run_dir, entries=("trainable", "frozen"))
        saving.write(Path(config.run_dir) / ADAPTER, config.method, _kept(config, held), config.base_hash)
    return summary


def start_of(config: FinetuneConfig, params: Any, num_labels: int) -> Start:
    """The base with its graft, and with a head for labels where there are some."""
    method = METHODS[config.method.name]
    if isinstance(config.method, ChildConfig) and config.method.mask == "fisher":
        allowed = "a run has no gradients to make the mask of before its first step (peft.methods.child.fisher_mask)"
        raise ConfigError("method.mask", config.method.mask, allowed, ["random"])

    def make(module: LanguageModel, key: Any, base: Any) -> Any:
        keys = jax.random.split(key)
        if num_labels:
            base = heads.add(config.model, base, keys[1], num_labels, "classifier")
        return method.graft(base, keys[0], config.method)

    def trains(grafted: Any) -> Any:
        learns = method.trainable(grafted, config.method)
        return lambda path, weight: learns(path, weight) or path.startswith("classifier/")

    return Start(
        make,
        (params,),
        trains,
        method.fold,
        schedule=_schedule(config),
        optimizer=lambda inner: method.optimizer(inner, config.method, config.steps),
        penalty=lambda params: method.penalty(params, config.method),
        restart=lambda state, key: method.restart(state, key, config.method),
        due=lambda step: method.due(step, config.method),
        keeps=method.saved is not None,  # then frozen weights change as well
    )


def _schedule(config: FinetuneConfig) -> optax.Schedule | None:
    """ReLoRA's own learning rates, which fall to zero at each restart; None for those the config names."""
    if not isinstance(config.method, ReLoRAConfig):
        return None
    rates = config.optimizer
    return relora.schedule(config.method, config.steps, rates.learning_rate, rates.warmup_steps, rates.final_fraction)


def _kept(config: FinetuneConfig, held: Any) -> dict[str, Any]:
    """What an adapter's file has of a checkpoint's weights, by path; ``held`` has all of them where any frozen one."""
    method = METHODS[config.method.name]
    if method.saved is None:
        return saving.arrays(held)
    keeps = method.saved(held, config.method)
    return {path: x for path, x in saving.arrays(held).items() if keeps(path, x)}
