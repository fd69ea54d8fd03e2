"""Everything that changes while training, in one tree, with the sharding of each of its arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from xylem.peft import tree
from xylem.sharding import BATCH, path_name, shardings


class TrainState(struct.PyTreeNode):
    """Parameters, what their optimizer remembers, and the randomness of the steps to come.

    Attributes:
        step: optimizer steps taken.
        trainable, frozen: the parameters, cut by ``peft.tree.partition``; gradients exist for the first alone.
        optimizer: optax state of the trainable ones.
        rng: key data; step s draws from ``fold_in(rng, s)``, so a resumed run draws what the unbroken one would.
        ema: moving average of the trainable ones, or None.
        nonfinite: steps in a row whose gradients were not finite, and which therefore changed nothing else.
        carry: the cache with which each row of the next batch goes on (``objectives.truncated``), or None.
    """

    step: Int[Array, ""] | Any
    trainable: Any
    frozen: Any
    optimizer: Any
    rng: UInt32[Array, "..."] | Any
    ema: Any
    nonfinite: Int[Array, ""] | Any
    carry: Any = None

    @property
    def params(self) -> Any:
        """The whole parameter tree as trained."""
        return tree.combine(self.trainable, self.frozen)

    @property
    def averaged(self) -> Any:
        """The whole parameter tree with the moving average in place of what is trained, where one is kept."""
        return self.params if self.ema is None else tree.combine(self.ema, self.frozen)


def everything(path: str, weight: Any) -> bool:
    """The predicate of full training."""
    return True


def new_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema: float | None = None,
    trains: Callable[[str, Any], bool] = everything,
) -> TrainState:
    """The state before the first step; ``trains(path, weight)`` chooses what is learned."""
    trainable, frozen = tree.partition(params, trains)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        frozen=frozen,
        optimizer=optimizer.init(trainable),
        rng=jax.random.key_data(jax.random.key(seed)),
        # A copy: the two trees are donated together, and one buffer cannot be given away twice.
        ema=None if ema is None else jax.tree.map(jnp.copy, trainable),
        nonfinite=jnp.zeros((), jnp.int32),
    )


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a state, the optimizer's and the average's derived from their weight's.

    ``state`` may be abstract. An array whose path ends in a parameter's and has its shape lies as that parameter lies;
    all others (counts, factored moments) are small and replicated. What is carried lies as its batch does.
    """
    params = tree.combine(state.trainable, state.frozen)
    placed = jax.tree_util.tree_leaves_with_path(shardings(params, mesh))
    shapes = [weight.shape for weight in jax.tree.leaves(params)]
    known = {path_name(path): (shape, where) for (path, where), shape in zip(placed, shapes, strict=True)}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, array):
        words = path_name(path).split("/")
        if words[0] == "carry":  # (L, P, B, ...), and lengths (B,)
            return NamedSharding(mesh, PartitionSpec(*[None] * (2 if array.ndim > 1 else 0), BATCH))
        for start in range(len(words)):
            shape, where = known.get("/".join(words[start:]), (None, None))
            if shape == array.shape:
                return where
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def abstract_state(create: Callable[..., TrainState], mesh: Mesh, *given: Any) -> TrainState:
    """Shape, type and sharding of every array of the state that ``create`` makes of ``given``, without making it."""
    shapes = jax.eval_shape(create, *given)
    struct_of = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(struct_of, shapes, state_shardings(shapes, mesh))


def make_state(create: Callable[..., TrainState], abstract: TrainState, *given: Any) -> TrainState:
    """The state that ``create`` makes of ``given`` weights, born sharded: no device ever holds more than its part.

    What is given may lie anywhere, as on the first device, where checkpoints are read to.
    """
    where = jax.tree.map(lambda x: x.sharding, abstract)
    mesh = jax.tree.leaves(where)[0].mesh
    placed = [jax.device_put(jax.tree.map(np.asarray, params), shardings(params, mesh)) for params in given]
    return jax.jit(create, out_shardings=where)(*placed)
