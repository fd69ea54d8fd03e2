"""DoRA (2402.09353): a weight's columns as lengths times directions; a pair turns them, a vector stretches them.

W' = m (W + scale A B) / |W + scale A B|     column by column (equation 5)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.leaves import Grafted, LowRank, aligned
from xylem.peft.config import DoRAConfig
from xylem.peft.methods import lora
from xylem.peft.tree import Predicate, Tree, beside, rewrite


@struct.dataclass
class Stretched(Grafted):
    """``base`` with columns of length ``magnitude``.

    The base's own lengths count as constants in the gradient (section 4.3).
    """

    base: LowRank | Any
    magnitude: Float[Array, "*L O"] | Any

    def _factor(self) -> Float[Array, "*L O"]:
        return self.magnitude / jax.lax.stop_gradient(lengths(self.base.materialize()))

    def einsum(self, equation: str, x: Array) -> Array:
        if equation != "...i,io->...o":
            return jnp.einsum(equation, x, self.materialize().astype(x.dtype))
        y = self.base.einsum(equation, x)
        factor = self._factor().astype(x.dtype)
        return y * factor.reshape(*[1] * (y.ndim - 1), -1)

    def take(self, ids: Int[Array, "..."]) -> Array:
        return jnp.take(self.materialize(), ids, axis=0)

    def materialize(self) -> Array:
        return self.base.materialize() * self._factor()[..., None, :]

    def beside(self, bias: Array) -> Array:
        return self.base.beside(bias)

    def rebase(self, weight: Array) -> Stretched:
        # W = (W' |V| / m) - scale A B needs |V|, which is that of W + scale A B: it is kept nowhere, W' has it in m.
        raise ValueError("DoRA: the lengths of the columns before it are gone once merged; keep the base")

    def specs(self, weight_spec: PartitionSpec) -> Stretched:
        *layers, _, columns = aligned(weight_spec, len(self.shape))
        return Stretched(self.base.specs(weight_spec), PartitionSpec(*layers, columns))


def lengths(weight: Float[Array, "*L I O"]) -> Float[Array, "*L O"]:
    """The length of each column, in float32."""
    return jnp.linalg.norm(weight.astype(jnp.float32), axis=-2).astype(weight.dtype)


def graft(params: Tree, key: PRNGKeyArray, config: DoRAConfig) -> Tree:
    """The tree with a pair and the columns' own lengths beside each target.

    Raises:
        ConfigError: a target is a table, which is looked up by rows.
    """

    def stretch(path: str, weight: Any, key: PRNGKeyArray) -> Stretched:
        if path.endswith("/embedding"):
            raise ConfigError("targets", config.targets, f"kernels alone have lengths by column; {path} is a table")
        base = lora.pair(path, weight, key, config)
        return Stretched(base, lengths(base.materialize()))

    return rewrite(params, config.targets, stretch, key)


def trainable(params: Tree, config: DoRAConfig) -> Predicate:
    """A, B and the lengths."""

    def learns(path: str, _: Any) -> bool:
        pair = path.replace("/base/", "/", 1)  # it lies below the lengths
        inner = pair != path and beside(pair, config.targets, ("a", "b"))
        return inner or beside(path, config.targets, ("magnitude",))

    return learns
