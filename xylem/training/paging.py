"""Optimizer state in the host's memory between steps (QLoRA 2305.14314, section 3, "paged optimizers").

The step brings the moments to the device and sends them back; XLA moves each when it is needed. Counts stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from xylem.errors import ConfigError
from xylem.training.state import TrainState

HOST = "pinned_host"


def paged(shardings: Any, arrays: Any) -> Any:
    """The shardings of an optimizer's state, those of its moments in the host's memory.

    ``arrays`` is that state, which may be abstract.

    Raises:
        ConfigError: the devices know no such memory.
    """

    def place(where: jax.sharding.NamedSharding, array: Any) -> jax.sharding.NamedSharding:
        device: Any = next(iter(where.device_set))
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            allowed = f"{device.device_kind} devices know {', '.join(kinds)} memory, and no {HOST}"
            raise ConfigError("optimizer.memory", "host", allowed, ["device"])
        return where.with_memory_kind(HOST) if array.ndim else where

    return jax.tree.map(place, shardings, arrays)


def on_host(optimizer: Any) -> Any:
    """An abstract optimizer's state (of ``state.abstract_state``) that lies as ``paged`` says."""
    where = paged(jax.tree.map(lambda x: x.sharding, optimizer), optimizer)
    return jax.tree.map(lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), optimizer, where)


def paged_restart(restart: Callable[[TrainState], TrainState]) -> Callable[[TrainState], TrainState]:
    """``paged_step`` of what changes a state without a batch."""
    stepped = paged_step(lambda state, _: (restart(state), None))
    return lambda state: stepped(state, None)[0]


def paged_step(step: Callable[[TrainState, Any], tuple[TrainState, Any]]) -> Callable[..., tuple[TrainState, Any]]:
    """``step`` for a state whose moments lie as ``paged`` says: they come, are moved, and go back. To be jitted with
    those shardings as ``out_shardings``."""

    def stepped(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        state, told = step(state.replace(optimizer=_move(state.optimizer, jax.memory.Space.Device)), batch)
        return state.replace(optimizer=_move(state.optimizer, jax.memory.Space.Host)), told

    return stepped


def _move(moments: Any, space: jax.memory.Space) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, moments)
