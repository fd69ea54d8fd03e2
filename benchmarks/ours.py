"""Our side of the training-step benchmarks, through the public path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers


def first_weights(config: Any) -> Any:
    """What all sides start from."""
    import jax
    import jax.numpy as jnp

    from xylem.models import build

    return build(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def save(config: Any, folder: str) -> None:
    """Write the first weights as a Hugging Face folder, which the peers load."""
    import jax

    from xylem.models import hub

    hub.save(folder, config, jax.jit(partial(first_weights, config))())


def stepper(
    config: Any,
    loss: Callable,
    data: list[dict[str, Any]],
    leave_out: tuple[str, ...] = (),
    graft: Callable[[Any], Any] = lambda params: params,
    trains: Callable[[str, Any], bool] = lambda path, weight: True,
) -> Callable[[int], float]:
    """``step(index) -> loss``: forward, backward and AdamW on ``data[index]``, round and round.

    ``loss(module, params, batch, rng) -> Sums``; parts of the tree to ``leave_out`` are not trained, nor held. What
    ``graft`` makes of the first weights is trained where ``trains`` holds.
    """
    import jax

    from xylem.launch import settle_jax
    from xylem.models import build
    from xylem.sharding import make_mesh
    from xylem.training.config import OptimizerConfig
    from xylem.training.optimizers import make_optimizer
    from xylem.training.state import abstract_state, make_state, new_state
    from xylem.training.step import train_step

    settle_jax()
    mesh = make_mesh(devices=jax.devices()[:1])
    constant: dict[str, Any] = {"schedule": "constant", "warmup_steps": 0, "clip_norm": None}
    optimizer = make_optimizer(OptimizerConfig(**constant, **peers.ADAMW), steps=10**6)

    def create():
        params = {name: part for name, part in first_weights(config).items() if name not in leave_out}
        return new_state(graft(params), optimizer, seed=0, trains=trains)

    with jax.set_mesh(mesh):
        abstract = abstract_state(create, mesh)
        state = make_state(create, abstract)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    one = partial(train_step, loss=partial(loss, build(config)), optimizer=optimizer)
    advance = jax.jit(one, donate_argnums=0, out_shardings=(where, None))
    placed = jax.tree.map(jax.numpy.asarray, data)

    def step(index: int) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = advance(state, placed[index % len(placed)])
        return float(metrics["loss"])

    return step
