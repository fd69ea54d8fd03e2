"""Learning rate as a function of the step; every schedule warms up linearly from 0 and peaks at ``learning_rate``."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from xylem.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule a config names, for a run of ``steps`` steps: the first is step 0, the last ``steps - 1``.

    - ``cosine``: half a cosine down to ``final_fraction`` of the peak (SGDR 1608.03983, equation 5, one cycle).
    - ``linear``: a straight line down to the same.
    - ``wsd``: warm up, stay, come down linearly over the last ``decay_fraction`` of the run (MiniCPM 2404.06395, 4).
    - ``noam``: ``min(step / warmup, sqrt(warmup / step))`` of the peak (1706.03762, section 5.3).
    - ``constant``: stay.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    # From the first step after the warm-up, at the peak, to the last one, at the final rate.
    final, rest = peak * config.final_fraction, max(1, steps - warmup - 1)
    if config.schedule == "noam":
        turn = max(1, warmup)
        return lambda step: peak * jnp.minimum((step + 1) / turn, jnp.sqrt(turn / (step + 1.0)))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":
        down = max(1, min(rest, round(config.decay_fraction * steps)))
        after = optax.linear_schedule(peak, final, down, transition_begin=rest - down)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), after], [warmup])
