"""One optimizer step and one validation step, as pure functions of (state, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from xylem.peft import tree
from xylem.training.objectives import Sums
from xylem.training.state import TrainState

Batch = dict[str, Array]
Loss = Callable[[Any, Batch, PRNGKeyArray | None], Sums]


def micro_batches(batch: Batch, count: int) -> Batch:
    """Cut the rows of a batch into ``count`` micro-batches on a new leading axis.

    Micro-batch i takes rows i, i + count, ...: so every device keeps the rows it holds.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def gradients(loss: Loss, state: TrainState, batch: Batch, accumulate: int, rng: PRNGKeyArray) -> tuple[Any, Sums]:
    """Gradient of the mean loss over the real labels of the whole batch, and the batch's sums.

    Each micro-batch's sum is divided by the whole batch's number of labels, so accumulation changes memory and
    nothing else, however the labels are spread. Behind the last micro-batch that has a label nothing is computed: a
    batch that grows (``data/ramp.py``) is one program.
    """
    total = jnp.maximum(batch["weights"].sum(), 1.0)

    def mean(trainable, micro, rng):
        sums = loss(tree.combine(trainable, state.frozen), micro, rng)
        return sums.loss / total, sums

    slope = jax.grad(mean, has_aux=True)
    if accumulate == 1:
        return slope(state.trainable, batch, rng)

    cut = micro_batches(batch, accumulate)
    labelled = (cut["weights"] != 0).reshape(accumulate, -1).any(axis=1)
    used = accumulate - jnp.argmax(jnp.flip(labelled))

    def add(index, carry):
        micro = jax.tree.map(lambda x: x[index], cut)
        new = slope(state.trainable, micro, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, carry, new)

    # float32 whatever the parameters' type: many small numbers are added here.
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
    start = (zero, Sums(*[jnp.zeros(())] * 3))
    return jax.lax.fori_loop(0, used, add, start)


def next_gradients(loss: Loss, state: TrainState, batch: Batch, accumulate: int) -> tuple[Any, Sums]:
    """``gradients`` as the next step of a state has them: by its randomness, going on from what it carries."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    batch = batch if state.carry is None else {**batch, "carry": state.carry}
    return gradients(loss, state, batch, accumulate, rng)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    ema: float | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one step, and its metrics: mean ``loss`` and ``nll`` in nats, ``gradient_norm``, and
    ``nonfinite``, how many steps in a row had a gradient that was not finite.

    When a gradient is not finite nothing is learned from the batch: the step counts, all else stays as it was.
    """
    grads, sums = next_gradients(loss, state, batch, accumulate)
    norm = optax.tree.norm(grads)
    updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    moved = {"trainable": trainable, "optimizer": moments, "ema": state.ema, "carry": sums.carry}
    if ema is not None:
        moved["ema"] = optax.incremental_update(moved["trainable"], state.ema, 1.0 - ema)
    finite = jnp.isfinite(norm)
    kept = {name: getattr(state, name) for name in moved}
    moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, kept)
    bad = jnp.where(finite, 0, state.nonfinite + 1)
    weight = jnp.maximum(sums.weight, 1.0)
    metrics = {"loss": sums.loss / weight, "nll": sums.nll / weight, "gradient_norm": norm, "nonfinite": bad}
    return state.replace(step=state.step + 1, nonfinite=bad, **moved), metrics


def eval_step(params: Any, batch: dict[str, Any], *, loss: Loss) -> Sums:
    """Sums of one validation batch, without dropout."""
    return loss(params, batch, None)
