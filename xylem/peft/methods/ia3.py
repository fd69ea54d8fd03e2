"""(IA)3 (2205.05638, section 3.3): keys, values and the feed-forward's inner activations are stretched by vectors."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.leaves import Grafted, aligned, bias_of, contract, plain, take
from xylem.peft.config import IA3Config
from xylem.peft.tree import Predicate, Tree, beside, matches, rewrite

PLACES = r"/((cross_)?attention|mlp|mixer)/|(^|/)embed/"


@struct.dataclass
class Rescaled(Grafted):
    """``base`` with every column multiplied by ``stretch``, or with every row where ``stretch`` is (..., I, 1).

    A bias belongs to the columns' outputs, and is stretched with them.
    """

    base: Any
    stretch: Float[Array, "*L I 1"] | Float[Array, "*L 1 O"] | Any

    def einsum(self, equation: str, x: Array) -> Array:
        if equation != "...i,io->...o":
            return jnp.einsum(equation, x, self.materialize().astype(x.dtype))
        stretch = self.stretch.astype(x.dtype).reshape(*[1] * (x.ndim - 1), -1)
        if self.stretch.shape[-1] == 1:
            return contract(equation, x * stretch, self.base)
        return contract(equation, x, self.base) * stretch

    def take(self, ids: Int[Array, "..."]) -> Array:
        if self.stretch.shape[-1] == 1:
            return take(self.base, ids) * jnp.take(self.stretch, ids, axis=0)
        return take(self.base, ids) * self.stretch.reshape(*[1] * ids.ndim, -1)

    def materialize(self) -> Array:
        return plain(self.base) * self.stretch

    def beside(self, bias: Array) -> Array:
        bias = bias_of(self.base, bias)
        return bias if self.stretch.shape[-1] == 1 else bias * self.stretch[..., 0, :].astype(bias.dtype)

    def rebase(self, weight: Array) -> Rescaled:
        return Rescaled(weight / self.stretch, self.stretch)

    def specs(self, weight_spec: PartitionSpec) -> Rescaled:
        *layers, rows, columns = aligned(weight_spec, len(self.shape))
        base = self.base_specs(weight_spec)
        by_row = self.stretch.shape[-1] == 1
        return Rescaled(base, PartitionSpec(*layers, *((rows, None) if by_row else (None, columns))))


def graft(params: Tree, key: PRNGKeyArray, config: IA3Config) -> Tree:
    """The tree with vectors of ones; the network computes what it did, to the bit.

    Raises:
        ConfigError: a target is in no attention, feed-forward or mixer.
    """

    def stretch(path: str, weight: Any, _: PRNGKeyArray) -> Rescaled:
        if not matches(PLACES, path):  # elsewhere biases are added without asking the weight
            raise ConfigError("targets", path, "(IA)3 stretches what attention, feed-forwards and mixers compute")
        *layers, rows, columns = weight.shape
        shape = (rows, 1) if matches(config.inputs, path) else (1, columns)
        return Rescaled(weight, jnp.ones((*layers, *shape), weight.dtype))

    return rewrite(params, f"(?:{config.outputs})|(?:{config.inputs})", stretch, key)


def trainable(params: Tree, config: IA3Config) -> Predicate:
    """The vectors."""
    return lambda path, _: beside(path, f"(?:{config.outputs})|(?:{config.inputs})", ("stretch",))
