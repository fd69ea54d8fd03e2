"""Optimizers from optax, made right for stacked layers: rules go by path and are written for one layer.

Left to themselves on a stacked tree, factored moments, RMS clipping and orthogonalisation would mix the layers of a
stack; ``peft.tree.per_layer`` maps each optimizer over the layer axis instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from xylem.peft import tree
from xylem.sharding import path_name
from xylem.training.config import OptimizerConfig
from xylem.training.schedules import make_schedule


def decays(path: str) -> bool:
    """Whether weight decay applies: to matrices and embeddings, never to biases, norm scales and Mamba's A and D, nor
    to what grafts stretch by, weigh or begin with."""
    plain = ("bias", "scale", "A_log", "D")
    return path.rsplit("/", 1)[-1] not in (*plain, "stretch", "magnitude", "values", "start")


def is_hidden_matrix(path: str) -> bool:
    """Whether Muon's orthogonal update applies: to the matrices inside layers, not to embeddings or the head.

    A convolution's kernel is no matrix: it has a few numbers for each channel and mixes none.
    """
    return path.endswith("/kernel") and not path.startswith("head/") and not path.endswith("/conv/kernel")


def _decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path_name(path)), params)


def _muon_labels(params: Any) -> Any:
    label = lambda path, _: "hidden" if is_hidden_matrix(path_name(path)) else "rest"  # noqa: E731
    return jax.tree_util.tree_map_with_path(label, params)


def _as_matrices(updates: Any) -> Any:
    return jax.tree.map(lambda _: MuonDimensionNumbers(), updates)


def _scale_to_adam(updates: Any, params: Any) -> Any:
    """An orthogonal matrix has root mean square 1/sqrt(max side); brought to 0.2, about AdamW's (2502.16982, 2.2)."""
    return jax.tree.map(lambda update: 0.2 * max(update.shape) ** 0.5 * update, updates)


def one_layer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer a config names, for a tree without layer axes.

    ``adamw`` 1711.05101, ``adafactor`` 1804.04235, ``lion`` 2302.06675, ``muon`` (Jordan et al. 2024; with the update
    scaled by 0.2 sqrt(max side), 2502.16982 section 2.2, one learning rate serves it and the AdamW of all the rest).
    """
    decay = {"weight_decay": config.weight_decay, "mask": _decay_mask}
    adamw = optax.adamw(schedule, b1=config.beta1, b2=config.beta2, eps=config.eps, **decay)
    if config.name == "adamw":
        return adamw
    if config.name == "lion":
        return optax.lion(schedule, b1=config.beta1, b2=config.beta2, **decay)
    if config.name == "adafactor":
        # optax adds this decay behind the learning rate, so it is scaled here as the others scale theirs.
        rate = lambda step: config.weight_decay * schedule(step)  # noqa: E731
        return optax.adafactor(schedule, weight_decay_rate=rate, weight_decay_mask=_decay_mask)
    # Not optax.contrib.muon: its AdamW would decay biases and norm scales too, and look ahead as Nesterov's.
    hidden = optax.chain(
        scale_by_muon(weight_dimension_numbers=_as_matrices),
        optax.stateless(_scale_to_adam),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition({"hidden": hidden, "rest": adamw}, _muon_labels)


def per_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer for stacked layers from one for a single layer: its state gains the same leading axis."""

    def learned(params):
        """The parts that hold arrays; a run that is frozen whole has none, and no layer axis to map over."""
        return {name: part for name, part in tree.parts(params).items() if not name or jax.tree.leaves(part)}

    def init(params):
        return tree.per_layer(optimizer.init)(learned(params))

    def update(updates, state, params=None):
        moved = tree.per_layer(optimizer.update)(learned(updates), state, learned(params))
        whole = tree.join({**tree.parts(updates), **{name: pair[0] for name, pair in moved.items()}})
        return whole, {name: pair[1] for name, pair in moved.items()}

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    schedule: optax.Schedule | None = None,
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda inner: inner,
) -> optax.GradientTransformation:
    """Clipping by the global norm of the whole tree, then the named optimizer layer by layer.

    ``schedule`` stands in place of the one the config names; ``wrap`` is what a method makes of the optimizer behind
    the clipping.
    """
    lifted = wrap(per_layer(one_layer(config, schedule or make_schedule(config, steps))))
    return lifted if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), lifted)
