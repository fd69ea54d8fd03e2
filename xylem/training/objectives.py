"""Losses: sums over the real tokens of a batch, so that any split of it adds up to the same mean.

An objective takes the final states and the head apart (``module.head``), never finished logits: the cross-entropy can
then go over the sequence in chunks and the T x V array never exists whole.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from xylem.models import fused
from xylem.models.language_model import LanguageModel
from xylem.training.config import ObjectiveConfig


class Sums(struct.PyTreeNode):
    """What a batch adds up to, in nats; divide by ``weight``, the number of real labels, for means."""

    loss: Float[Array, ""] | Any
    nll: Float[Array, ""] | Any
    weight: Float[Array, ""] | Any


def causal_lm(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    rng: PRNGKeyArray | None = None,
) -> Sums:
    """Next-token prediction: the negative log-likelihood of ``labels`` where ``weights`` is 1.

    ``loss`` also holds label smoothing and z-loss; ``nll`` never does. With ``rng`` dropout is applied.
    """
    rngs = None if rng is None else {"dropout": rng}
    tokens, segments = batch["tokens"], batch.get("segments")
    out: Any = module.apply({"params": params}, tokens, segments=segments, train=rng is not None, rngs=rngs)
    kernels = fused.choose(module.config.compute, jax.default_backend())
    weights = batch["weights"]
    args = (module.head, module.head_params(params), out.hidden, batch["labels"], weights)
    if kernels.cross_entropy:
        chunk = kernels.loss_chunk(tokens.shape[0], tokens.shape[1], module.config.vocab_size)
        loss, nll = fused.cross_entropy(*args, config.label_smoothing, config.z_loss, chunk)
    else:
        loss, nll = fused.cross_entropy_plain(*args, config.label_smoothing, config.z_loss)
    return Sums(loss=loss, nll=nll, weight=weights.sum())
