"""What a run computes: its module, its state and its two compiled steps, from a config and a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from xylem import models
from xylem.errors import ConfigError
from xylem.models.language_model import LanguageModel
from xylem.sharding import BATCH
from xylem.training.config import RunConfig
from xylem.training.objective_config import ObjectiveConfig, SampledConfig
from xylem.training.objectives import causal_lm, masked_lm, next_window
from xylem.training.optimizers import make_optimizer
from xylem.training.scheduled_sampling import make_decay, scheduled_sampling
from xylem.training.state import TrainState, abstract_state, new_state
from xylem.training.step import Batch, Loss, eval_step, train_step


class Program(NamedTuple):
    """The parts of a run that are functions and shapes, before any array exists.

    Attributes:
        module: the network.
        create: makes the state before the first step.
        abstract: shape, type and sharding of every array of that state.
        step: (state, batch) -> (state, metrics), jitted; the state is donated.
        validate: (params, batch) -> sums, jitted; a batch may hold the ``carry`` of the one before it.
    """

    module: LanguageModel
    create: Callable[[], TrainState]
    abstract: TrainState
    step: Any
    validate: Any

    def first_carry(self) -> Any:
        """What the first batch of a text is given to go on from; None where nothing is handed on."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self.abstract.carry)

    @property
    def state_bytes(self) -> int:
        """Size of the whole state, over all devices."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract))


def assemble(config: RunConfig, mesh: Mesh) -> Program:
    """The program of a run on a mesh; nothing is compiled or allocated yet.

    Raises:
        ConfigError: the mesh divides neither a parameter that it should split nor the batch.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH) * config.accumulate
    if config.batch_size % parts:
        allowed = f"mesh.data x mesh.fsdp x accumulate = {parts} must divide it"
        raise ConfigError("batch_size", config.batch_size, allowed)
    module, optimizer = models.build(config.model), make_optimizer(config.optimizer, config.steps)
    carries = config.objective.name == "truncated"
    judged = {"masked_lm": masked_lm, "truncated": next_window}.get(config.objective.name, causal_lm)

    def create() -> TrainState:
        params = module.init(jax.random.key(config.seed), jnp.zeros((1, 2), jnp.int32))["params"]
        state = new_state(params, optimizer, config.seed, config.ema)
        return state.replace(carry=module.init_cache(config.batch_size, 0)) if carries else state

    abstract = abstract_state(create, mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    settings = {"optimizer": optimizer, "accumulate": config.accumulate, "ema": config.ema}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        loss, told = minimised(module, config.objective, state.step)
        state, metrics = train_step(state, batch, loss=loss, **settings)
        return state, metrics | told

    return Program(
        module=module,
        create=create,
        abstract=abstract,
        step=jax.jit(step, donate_argnums=0, out_shardings=(where, None)),
        validate=jax.jit(partial(eval_step, loss=partial(judged, module, config.objective))),
    )


def minimised(module: LanguageModel, objective: ObjectiveConfig, step: Any) -> tuple[Loss, dict[str, Array]]:
    """What step ``step`` of a run minimises, and what its metrics tell of that."""
    if isinstance(objective, SampledConfig):
        epsilon = make_decay(objective)(step)
        loss: Any = partial(scheduled_sampling, module, objective, epsilon=epsilon)  # a step always has randomness
        return loss, {"epsilon": epsilon}
    losses = {"truncated": next_window, "masked_lm": masked_lm}
    return partial(losses.get(objective.name, causal_lm), module, objective), {}


def settled(config: RunConfig, **chosen: str) -> RunConfig:
    """The config with what ``compute`` leaves to measurement settled: for compiling for a backend that is not here."""
    compute = config.model.compute
    kept: dict[str, Any] = {name: value for name, value in chosen.items() if getattr(compute, name) == "auto"}
    return dataclasses.replace(config, model=config.model.with_compute(dataclasses.replace(compute, **kept)))
