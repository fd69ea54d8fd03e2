"""What a run computes: its module, its state and its two compiled steps, from a config and a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from xylem import models
from xylem.errors import ConfigError
from xylem.models.language_model import LanguageModel
from xylem.sharding import BATCH
from xylem.training.classification import text_classification, token_classification
from xylem.training.config import RunConfig
from xylem.training.objective_config import ObjectiveConfig, SampledConfig
from xylem.training.objectives import Sums, causal_lm, masked_lm, next_window
from xylem.training.optimizers import make_optimizer
from xylem.training.paging import on_host, paged_restart, paged_step
from xylem.training.scheduled_sampling import make_decay, scheduled_sampling
from xylem.training.schedules import make_schedule
from xylem.training.state import TrainState, abstract_state, everything, make_state, new_state
from xylem.training.step import Batch, Loss, eval_step, next_gradients, train_step


class Program(NamedTuple):
    """The parts of a run that are functions and shapes, before any array exists.

    Attributes:
        module: the network.
        create: makes the state before the first step, from ``given``.
        abstract: shape, type and sharding of every array of that state.
        schedule: the learning rate by step.
        step: (state, batch) -> (state, metrics), jitted; the state is donated.
        validate: (params, batch) -> sums, jitted; a batch may hold the ``carry`` of the one before it.
        restart: state -> state, jitted; the state is donated. What comes before a step for whose number, counted from
            0, ``due`` holds: a program of its own, as a condition inside the step would cost a copy of the state.
        fold: params -> what the network is given.
        given: the weights that ``create`` is given; none for a network that begins fresh.
        keeps: whether a checkpoint has the frozen weights; else they are made again, of ``given``.
        prepare: what happens to the state before the first step.
    """

    module: LanguageModel
    create: Callable[..., TrainState]
    abstract: TrainState
    schedule: optax.Schedule
    step: Any
    validate: Any
    restart: Any
    due: Callable[[int], Any]
    fold: Callable[[Any], Any]
    given: tuple[Any, ...] = ()
    keeps: bool = True
    prepare: Callable[[TrainState], TrainState] = lambda state: state

    def start(self) -> TrainState:
        """The state before the first step, born sharded."""
        return self.prepare(self._born())

    def _born(self) -> TrainState:
        return make_state(self.create, self.abstract, *self.given)

    def saved(self, state: TrainState) -> TrainState:
        """What a checkpoint has of a state."""
        return state if self.keeps else state.replace(frozen=None)

    def resume(self, saved: TrainState) -> TrainState:
        """The state that a checkpoint was ``saved`` from."""
        return saved if self.keeps else saved.replace(frozen=self._born().frozen)

    def first_carry(self) -> Any:
        """What the first batch of a text is given to go on from; None where nothing is handed on."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self.abstract.carry)

    @property
    def state_bytes(self) -> int:
        """Size of the whole state, over all devices."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract))


class Start(NamedTuple):
    """Where a run begins, and what it changes.

    Attributes:
        params: ``(module, key, *given) -> params``.
        given: weights that the parameters are made of.
        trains: which of them learn, of ``params``.
        fold: what the network is given, of ``params``.
        schedule: the learning rates, in place of those the config names.
        optimizer: around the optimizer of the config.
        penalty: what the loss has added, of what is learned.
        restart: what happens to a state before a step for which ``due`` holds, given randomness.
        keeps: see ``Program``.
        prepare: ``(state, next_gradients) -> state``: what happens to the state before the first step, given the
            jitted ``(state, batch) -> (gradients, sums)`` of a run that begins there.
    """

    params: Callable[..., Any]
    given: tuple[Any, ...] = ()
    trains: Callable[[Any], Callable[[str, Any], bool]] = lambda params: everything
    fold: Callable[[Any], Any] = lambda params: params
    schedule: optax.Schedule | None = None
    optimizer: Callable[[Any], Any] = lambda inner: inner
    penalty: Callable[[Any], Any] = lambda params: 0.0
    restart: Callable[[TrainState, Any], TrainState] = lambda state, key: state
    due: Callable[[int], Any] = lambda step: False
    keeps: bool = True
    prepare: Callable[[TrainState, Any], TrainState] = lambda state, slope: state


def fresh(module: LanguageModel, key: Any) -> Any:
    """A network as it is born."""
    return module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


FRESH = Start(fresh)


def assemble(config: RunConfig, mesh: Mesh, begin: Start = FRESH) -> Program:
    """The program of a run on a mesh; nothing is compiled or allocated yet.

    Raises:
        ConfigError: the mesh divides neither a parameter that it should split nor the batch.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH) * config.accumulate
    if config.batch_size % parts:
        allowed = f"mesh.data x mesh.fsdp x accumulate = {parts} must divide it"
        raise ConfigError("batch_size", config.batch_size, allowed)
    module = models.build(config.model)
    schedule = begin.schedule or make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, config.steps, schedule, begin.optimizer)
    carries = config.objective.name == "truncated"

    def create(*given: Any) -> TrainState:
        params = begin.params(module, jax.random.key(config.seed), *given)
        state = new_state(params, optimizer, config.seed, config.ema, begin.trains(params))
        return state.replace(carry=module.init_cache(config.batch_size, 0)) if carries else state

    abstract = abstract_state(create, mesh, *begin.given)
    if config.optimizer.memory == "host":
        abstract = abstract.replace(optimizer=on_host(abstract.optimizer))
    where = jax.tree.map(lambda x: x.sharding, abstract)
    settings = {"optimizer": optimizer, "accumulate": config.accumulate, "ema": config.ema}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        loss, told = minimised(module, config.objective, state.step)
        state, metrics = train_step(state, batch, loss=folding(loss, begin), **settings)
        return state, metrics | told

    def slope(state: TrainState, batch: Batch) -> tuple[Any, Sums]:
        loss, _ = minimised(module, config.objective, state.step)
        return next_gradients(folding(loss, begin), state, batch, config.accumulate)

    def restart(state: TrainState) -> TrainState:
        # No step draws from this number: those are counted from 0.
        return begin.restart(state, jax.random.fold_in(jax.random.wrap_key_data(state.rng), ~state.step))

    if config.optimizer.memory == "host":
        step, restart = paged_step(step), paged_restart(restart)  # pyright: ignore[reportAssignmentType]
    judged = partial(LOSSES.get(config.objective.name, causal_lm), module, config.objective)
    return Program(
        module=module,
        create=create,
        abstract=abstract,
        schedule=schedule,
        step=jax.jit(step, donate_argnums=0, out_shardings=(where, None)),
        validate=jax.jit(partial(eval_step, loss=lambda params, *rest: judged(begin.fold(params), *rest))),
        restart=jax.jit(restart, donate_argnums=0, out_shardings=where),
        due=begin.due,
        fold=begin.fold,
        given=begin.given,
        keeps=begin.keeps,
        prepare=lambda state: begin.prepare(state, jax.jit(slope)),
    )


def folding(loss: Loss, begin: Start) -> Loss:
    """A loss of what a network is given, as one of what is learned, the penalty included."""

    def whole(params: Any, batch: Batch, rng: Any) -> Any:
        sums = loss(begin.fold(params), batch, rng)
        return sums.replace(loss=sums.loss + begin.penalty(params) * sums.weight)

    return whole


LOSSES = {
    "truncated": next_window,
    "masked_lm": masked_lm,
    "classification": text_classification,
    "token_classification": token_classification,
}


def minimised(module: LanguageModel, objective: ObjectiveConfig, step: Any) -> tuple[Loss, dict[str, Array]]:
    """What step ``step`` of a run minimises, and what its metrics tell of that."""
    if isinstance(objective, SampledConfig):
        epsilon = make_decay(objective)(step)
        loss: Any = partial(scheduled_sampling, module, objective, epsilon=epsilon)  # a step always has randomness
        return loss, {"epsilon": epsilon}
    return partial(LOSSES.get(objective.name, causal_lm), module, objective), {}


def settled(config: RunConfig, **chosen: str) -> RunConfig:
    """The config with what ``compute`` leaves to measurement settled: for compiling for a backend that is not here."""
    compute = config.model.compute
    kept: dict[str, Any] = {name: value for name, value in chosen.items() if getattr(compute, name) == "auto"}
    return dataclasses.replace(config, model=config.model.with_compute(dataclasses.replace(compute, **kept)))
