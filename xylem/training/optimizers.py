"""Optimizers from optax, made right for stacked layers: rules go by path and are written for one layer.

Left to themselves on a stacked tree, factored moments, RMS clipping and orthogonalisation would mix the layers of a
stack; ``peft.tree.per_layer`` maps each optimizer over the layer axis instead.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from xylem.peft import tree
from xylem.sharding import path_name
from xylem.training.config import OptimizerConfig
from xylem.training.schedules import make_schedule


def decays(path: str) -> bool:
    """Whether weight decay applies: to matrices and embeddings, never to biases and norm scales."""
    return path.rsplit("/", 1)[-1] not in ("bias", "scale")


def is_hidden_matrix(path: str) -> bool:
    """Whether Muon's orthogonal update applies: to the kernels inside layers, not to embeddings or the head."""
    return path.endswith("/kernel") and not path.startswith("head/")


def _by_path(rule, params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: rule(path_name(path)), params)


def _decay_mask(params: Any) -> Any:
    return _by_path(decays, params)


def _muon_axes(params: Any) -> Any:
    return _by_path(lambda path: MuonDimensionNumbers() if is_hidden_matrix(path) else None, params)


def one_layer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer a config names, for a tree without layer axes.

    ``adamw`` 1711.05101, ``adafactor`` 1804.04235, ``lion`` 2302.06675, ``muon`` (Jordan et al. 2024; with the update
    scaled by 0.2 sqrt(max side), 2502.16982 section 2.2, one learning rate serves it and the AdamW that moves the rest).
    """
    decay = {"weight_decay": config.weight_decay, "mask": _decay_mask}
    if config.name == "adamw":
        return optax.adamw(schedule, b1=config.beta1, b2=config.beta2, eps=config.eps, **decay)
    if config.name == "lion":
        return optax.lion(schedule, b1=config.beta1, b2=config.beta2, **decay)
    if config.name == "adafactor":
        # optax adds this decay behind the learning rate, so it is scaled here as the others scale theirs.
        rate = lambda step: config.weight_decay * schedule(step)  # noqa: E731
        return optax.adafactor(schedule, weight_decay_rate=rate, weight_decay_mask=_decay_mask)
    return muon(
        schedule,
        weight_decay=config.weight_decay,
        weight_decay_mask=_decay_mask,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=0.2,
    )


def per_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer for stacked layers from one for a single layer: its state gains the same leading axis."""

    def init(params):
        return tree.per_layer(optimizer.init)(tree.parts(params))

    def update(grads, state, params):
        moved = tree.per_layer(optimizer.update)(tree.parts(grads), state, tree.parts(params))
        updates = tree.join({name: pair[0] for name, pair in moved.items()})
        return updates, {name: pair[1] for name, pair in moved.items()}

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm of the whole tree, then the named optimizer layer by layer."""
    lifted = per_layer(one_layer(config, make_schedule(config, steps)))
    return lifted if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), lifted)
