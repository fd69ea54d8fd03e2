"""Fine-tuning: the loop of pretraining, begun with a base that a method is grafted onto."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xylem import models
from xylem.data.pipeline import Prepared, TrainIterator
from xylem.data.tokenizers import Tokenizer
from xylem.errors import ConfigError
from xylem.generation.sampling import virtual_tokens
from xylem.models import heads
from xylem.models.language_model import LanguageModel
from xylem.peft import saving
from xylem.peft.calls import METHODS
from xylem.peft.config import ChildConfig, PrefixConfig, PromptConfig, ReLoRAConfig
from xylem.peft.methods import child, relora
from xylem.sharding import batch_sharding
from xylem.training.checkpoint import load_params
from xylem.training.finetune_config import HEADS, FinetuneConfig, room_for
from xylem.training.inputs import tuning_data
from xylem.training.loop import corpus_of, train
from xylem.training.program import Start, assemble
from xylem.training.state import TrainState

ADAPTER = "adapter"  # in the run folder, at its end
SCALES = ("kernel/scale", "embedding/scale", "base/scale")  # of pairs and triplets


def finetune(config: FinetuneConfig, params: Any, tokenizer: Tokenizer, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune ``params`` as ``config`` says, or go on with what its run folder holds; returns the final figures.

    The run folder is that of pretraining; its checkpoints hold what is learned, not the base, and ``adapter/`` is it as
    a file of its own (``peft.saving``).
    """
    check_room(config, params)
    own = tuning_data(config.objective.name, config.model, config.data, tokenizer)
    data, labels = own or (corpus_of(config), [])
    config = replace(config, base_hash=saving.fingerprint(params), labels=tuple(labels))
    begin = start_of(config, params, data)
    summary = train(config, partial(assemble, config, begin=begin), lambda _: data, argv)
    if summary["step"] == config.steps and jax.process_index() == 0:
        about: dict[str, Any] = {"base_path": config.base, "objective": config.objective.name, "labels": config.labels}
        about["data"] = asdict(config.data)
        saving.write(Path(config.run_dir) / ADAPTER, config.method, _kept(config), config.base_hash, **about)
    return summary


def check_room(config: FinetuneConfig, params: Any) -> None:
    """Refuse rows that, virtual tokens in front, are longer than the model's table of positions.

    Raises:
        ConfigError: so it is; ``params`` may hold virtual tokens, and the method may add some.
    """
    added = config.method.length if isinstance(config.method, PromptConfig | PrefixConfig) else 0
    virtual = added + max(virtual_tokens(models.build(config.model), params))
    if config.tokens_read > (room := room_for(config.model, virtual)):
        allowed = f"{config.tokens_read} tokens are read, {room} fit beside {virtual} virtual ones"
        raise ConfigError("data.sequence_length", config.data.sequence_length, allowed)


def start_of(config: FinetuneConfig, params: Any, data: Prepared) -> Start:
    """The base with its graft, and with a head for labels where there are some; ``data`` is what it will learn from."""
    method, head = METHODS[config.method.name], HEADS.get(config.objective.name)
    fresh = ("classifier/", "tagger/") if "pooler" in params else ("classifier/", "tagger/", "pooler/")

    def make(module: LanguageModel, key: Any, base: Any) -> Any:
        keys = jax.random.split(key)
        if head is not None:
            base = heads.add(config.model, base, keys[1], len(config.labels), head)
        return method.graft(base, keys[0], config.method)

    def trains(grafted: Any) -> Any:
        learns = method.trainable(grafted, config.method)

        def chosen(path: str, weight: Any) -> bool:  # a pair's scale is a constant, whatever a pattern finds
            return (learns(path, weight) or path.startswith(fresh)) and not path.endswith(SCALES)

        for path, weight in saving.arrays(grafted).items():
            if chosen(path, weight) and not jnp.issubdtype(weight.dtype, jnp.inexact):
                allowed = f"it would teach {path}, which holds integers: begin with a base that is not quantized"
                raise ConfigError("method", config.method.name, allowed)
        return chosen

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
        prepare=partial(_informed, config, data),
    )


def _informed(config: FinetuneConfig, data: Prepared, state: TrainState, next_gradients: Any) -> TrainState:
    """The state before the first step; in Child-tuning D with the mask that the run's first batches tell, whose
    gradients are those of its first steps if nothing were learned from them (``peft.methods.child``)."""
    method = config.method
    if not isinstance(method, ChildConfig) or method.mask != "fisher":
        return state
    order = "consecutive" if config.objective.name == "truncated" else "shuffled"
    hosts: dict[str, Any] = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = TrainIterator(data, config.batch_size, config.seed, order=order, **hosts)
    rows = batch_sharding(jax.tree.leaves(state.trainable)[0].sharding.mesh)
    place = partial(jax.tree.map, partial(jax.make_array_from_process_local_data, rows))
    epoch = max(1, len(data.source("train")) // config.batch_size)

    def gradients() -> Iterator[Any]:
        here = state
        for _ in range(min(method.batches, epoch)):
            slope, sums = next_gradients(here, place(next(batches)))
            here = here.replace(step=here.step + 1, carry=sums.carry)
            yield slope

    mask = child.fisher_mask(gradients(), method)
    return state.replace(optimizer=child.chosen(state.optimizer, mask))


def _schedule(config: FinetuneConfig) -> optax.Schedule | None:
    """ReLoRA's own learning rates, which fall to zero at each restart; None for those the config names."""
    if not isinstance(config.method, ReLoRAConfig):
        return None
    rates = config.optimizer
    return relora.schedule(config.method, config.steps, rates.learning_rate, rates.warmup_steps, rates.final_fraction)


def _kept(config: FinetuneConfig) -> dict[str, Any]:
    """What an adapter's file has of the weights in a run's last checkpoint, by path: what learned, averaged where the
    run keeps that, and the frozen weights that its method changes."""
    method, learned = METHODS[config.method.name], "trainable" if config.ema is None else "ema"
    kept = saving.arrays(load_params(config.run_dir, entries=(learned,))[0])
    if method.saved is None:
        return kept
    held, _ = load_params(config.run_dir, entries=(learned, "frozen"))
    keeps = method.saved(held, config.method)
    return kept | {path: x for path, x in saving.arrays(held).items() if keeps(path, x)}
