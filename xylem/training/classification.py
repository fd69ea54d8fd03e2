"""Losses of the heads in ``models/heads.py``: sums over real labels, as those of ``objectives.py``.

A batch has ``tokens``, ``segments``, perhaps ``token_types``, and ``labels`` with ``weights``: (B,) of texts, (B, T) of
tokens. A label of weight 0 (padding, the inner pieces of a word) may be any number: torch's -100 is one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from xylem.models import heads
from xylem.models.fused_cross_entropy import cross_entropy_plain
from xylem.models.language_model import LanguageModel
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import Sums, cross_entropy, forward

AUXILIARY = 0.5  # GPT-1 (Radford et al. 2018), section 4.1: lambda of equation 5


def text_classification(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    rng: PRNGKeyArray | None = None,
) -> Sums:
    """The negative log-likelihood of each text's label under ``classifier``."""
    return _of_texts(config, params, batch, forward(module, params, batch, rng), rng)


def token_classification(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    rng: PRNGKeyArray | None = None,
) -> Sums:
    """The negative log-likelihood of each token's label under ``tagger``."""
    out = forward(module, params, batch, rng)
    states = heads.dropped(out.hidden, _head_rng(rng))
    return _entropy(config, params["tagger"], states, batch["labels"], batch["weights"])


def text_classification_with_lm(
    module: LanguageModel,
    config: ObjectiveConfig,
    params: Any,
    batch: dict[str, Array],
    rng: PRNGKeyArray | None = None,
    auxiliary: float = AUXILIARY,
) -> Sums:
    """``text_classification`` by a decoder that goes on predicting the text: L2 + lambda L1 (GPT-1, equation 5).

    L1 is a text's mean over its next tokens (openai/finetune-transformer-lm, train.py), so that a text counts by its
    weight whatever its length. ``nll`` is that of the labels alone.
    """
    out = forward(module, params, batch, rng)
    sums = _of_texts(config, params, batch, out, rng)
    following = (batch["segments"][:, 1:] > 0).astype(jnp.float32)
    shares = following / jnp.maximum(following.sum(1, keepdims=True), 1.0)
    text = {"labels": batch["tokens"][:, 1:], "weights": shares * batch["weights"][:, None]}
    return sums.replace(
        loss=sums.loss + auxiliary * cross_entropy(module, config, params, text, out.hidden[:, :-1]).loss
    )


def _of_texts(config: ObjectiveConfig, params: Any, batch: dict[str, Array], out: Any, rng: Any) -> Sums:
    states = heads.text_states(params, out, batch.get("segments"), _head_rng(rng))
    return _entropy(config, params["classifier"], states[:, None], batch["labels"][:, None], batch["weights"][:, None])


def _entropy(config: ObjectiveConfig, head: Any, states: Array, labels: Array, weights: Array) -> Sums:
    settings = config.label_smoothing, config.z_loss
    loss, nll = cross_entropy_plain(heads.scores, head, states, labels, weights, *settings)
    return Sums(loss=loss, nll=nll, weight=weights.sum())


def _head_rng(rng: PRNGKeyArray | None) -> PRNGKeyArray | None:
    """The head's own randomness beside the trunk's."""
    return None if rng is None else jax.random.fold_in(rng, 0)
