"""Scheduled sampling (1506.03099): training on prefixes that the model itself wrote, more and more of them.

Teacher forcing shows a model the true tokens before the one to predict; when it writes, it sees its own. Here each
token it is shown is the true one with probability epsilon and otherwise drawn from the model, and epsilon falls.

No gradient passes through the drawing (section 2.4), so which tokens are shown may be settled first, one by one with a
cache, and the loss is then ``causal_lm`` of those: any family with a cache can train so, at the full speed of its
parallel forward pass, and with epsilon = 1 it is teacher forcing, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.models.language_model import LanguageModel
from xylem.training.objective_config import ObjectiveConfig, SampledConfig, decay_of
from xylem.training.objectives import Sums, causal_lm

Epsilon = Float[Array, ""] | float
Decay = Callable[[Any], Any]


def scheduled_sampling(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    rng: PRNGKeyArray,
    epsilon: Epsilon,
) -> Sums:
    """``causal_lm`` of the batch with its inputs mixed by ``mixed_inputs``; the labels stay the true ones."""
    drawing = jax.random.fold_in(rng, 0)
    tokens = mixed_inputs(module, params, batch["tokens"], batch.get("segments"), drawing, epsilon)
    return causal_lm(module, config, params, {**batch, "tokens": tokens}, rng)


def mixed_inputs(
    module: LanguageModel,
    params: Any,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    rng: PRNGKeyArray,
    epsilon: Epsilon,
) -> Int[Array, "B T"]:
    """The tokens, each kept with probability ``epsilon`` and else drawn from the model that has read those before it.

    A coin is thrown for every token of every row. The first of a document is always the true one, and so is padding.
    The model draws without dropout.
    """
    batch, length = tokens.shape
    segments = jnp.ones_like(tokens) if segments is None else segments
    begins = jnp.diff(segments, axis=1, prepend=-1) != 0
    coins, draws = jax.random.split(rng)
    kept = jax.random.bernoulli(coins, epsilon, tokens.shape) | begins | (segments == 0)
    params = jax.lax.stop_gradient(params)

    empty = module.init_cache(batch, length, params)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        (cache, drawn), (true, kept, begins, real, key) = carry, inputs
        token = jnp.where(kept, true, drawn)
        cache = cache.rewind(jnp.where(begins, empty.lengths, cache.lengths))
        out: Any = module.apply({"params": params}, token[:, None], segments=real[:, None], cache=cache)
        drawn = jax.random.categorical(key, module.head(params, out.hidden[:, 0])).astype(tokens.dtype)
        return (out.cache, drawn), token

    inputs = (tokens.T, kept.T, begins.T, (segments > 0).astype(jnp.int32).T, jax.random.split(draws, length))
    start = (empty, tokens[:, 0])
    return jax.lax.scan(step, start, inputs)[1].T


def make_decay(config: SampledConfig) -> Decay:
    """Epsilon as a function of the step, the first being step 0 (section 2.4; ``SampledConfig.decay``)."""
    kind, numbers = decay_of(config.decay)
    if kind == "linear":
        start, slope, least = numbers
        return lambda step: jnp.maximum(least, start - slope * step)
    (number,) = numbers
    if kind == "exponential":
        return lambda step: jnp.exp(step * math.log(number))
    return lambda step: jax.nn.sigmoid(math.log(number) - step / number)
