"""Losses: sums over the real tokens of a batch, so that any split of it adds up to the same mean.

An objective takes the final states and the head apart (``module.head``), never finished logits: the cross-entropy can
then go over the sequence in chunks and the T x V array never exists whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PRNGKeyArray

from xylem.models import fused, fused_cross_entropy
from xylem.models.cache import StateCache
from xylem.models.language_model import LanguageModel
from xylem.training.objective_config import ObjectiveConfig


class Sums(struct.PyTreeNode):
    """What a batch adds up to, in nats; divide by ``weight``, the number of real labels, for means.

    ``carry`` is the state that an objective hands to the next batch; None for those that hand none.
    """

    loss: Float[Array, ""] | Any
    nll: Float[Array, ""] | Any
    weight: Float[Array, ""] | Any
    carry: Any = None


def causal_lm(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    rng: PRNGKeyArray | None = None,
) -> Sums:
    """Next-token prediction: the negative log-likelihood of ``labels`` where ``weights`` is 1.

    An encoder-decoder predicts its target, from a batch that has ``decoder_tokens``. ``loss`` also holds label
    smoothing and z-loss; ``nll`` never does. With ``rng`` dropout is applied.
    """
    out = forward(module, params, batch, rng)
    return cross_entropy(module, config, params, batch, out.hidden)


def masked_lm(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    rng: PRNGKeyArray | None = None,
) -> Sums:
    """Prediction of the tokens at ``places``, and where the batch has ``pair_labels`` the judgement of each pair.

    Final states are gathered before the head, so that it is computed where a token was hidden and nowhere else.
    ``loss`` is the mean over hidden tokens plus the mean over pairs (BERT 1810.04805, appendix A.2), a pair counting by
    its hidden tokens, so that any split of a batch adds up to the same; ``nll`` is that of the tokens alone.
    """
    out: Any = forward(module, params, batch, rng)
    sums = cross_entropy(
        module, config, params, batch, jnp.take_along_axis(out.hidden, batch["places"][..., None], axis=1)
    )
    if "pair_labels" not in batch:
        return sums
    scores = jax.nn.log_softmax(out.pair_logits)
    judged = -jnp.take_along_axis(scores, batch["pair_labels"][:, None], axis=1)[:, 0]
    return sums.replace(loss=sums.loss + (judged * batch["weights"].sum(axis=1)).sum())


def truncated(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    cache: StateCache,
    rng: PRNGKeyArray | None = None,
) -> tuple[Sums, StateCache]:
    """``causal_lm`` of a window that goes on where the last one of each row ended, and the state that it leaves.

    Truncated back-propagation through time of a recurrent model (Williams & Peng 1990, "An Efficient Gradient-Based
    Algorithm"; h = h' = window): what was read before matters, but no gradient goes there. ``segments`` part the
    documents within the window. A row whose window opens a new document is rewound by the caller:
    ``cache.rewind(jnp.where(opens, 0, cache.lengths))``.
    """
    out = forward(module, params, batch, rng, cache=jax.lax.stop_gradient(cache))
    return cross_entropy(module, config, params, batch, out.hidden), out.cache


def next_window(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Any],
    rng: PRNGKeyArray | None = None,
) -> Sums:
    """``truncated`` of a batch that also holds ``carry``, the cache the last one left, and ``opens``: the rows that
    begin a document and start from nothing."""
    before, window = batch["carry"], {name: x for name, x in batch.items() if name != "carry"}
    cache = before.rewind(jnp.where(batch["opens"] > 0, 0, before.lengths))
    sums, after = truncated(module, config, params, window, cache, rng)
    return sums.replace(carry=after)


def forward(module: LanguageModel, params: Any, batch: dict[str, Array], rng: PRNGKeyArray | None, **more: Any) -> Any:
    """The model's Output for a batch, of which it reads what it can; ``more`` are further arguments of the call."""
    rngs = None if rng is None else {"dropout": rng}
    more |= {name: batch[name] for name in ("segments", "token_types", "decoder_tokens") if name in batch}
    return module.apply({"params": params}, batch["tokens"], **more, train=rng is not None, rngs=rngs)


def cross_entropy(
    module: LanguageModel, config: ObjectiveConfig, params: Any, batch: dict[str, Array], hidden: Array
) -> Sums:
    """The cross-entropy of final states."""
    kernels = fused.choose(module.config.compute, jax.default_backend())
    labels, weights = batch["labels"], batch["weights"]
    args = (module.head, module.head_params(params), hidden, labels, weights)
    if kernels.cross_entropy:
        batch_size, length = labels.shape
        chunk = kernels.loss_chunk(batch_size, length, module.config.vocab_size)
        loss, nll = fused_cross_entropy.cross_entropy(*args, config.label_smoothing, config.z_loss, chunk)
    else:
        loss, nll = fused_cross_entropy.cross_entropy_plain(*args, config.label_smoothing, config.z_loss)
    return Sums(loss=loss, nll=nll, weight=weights.sum())
