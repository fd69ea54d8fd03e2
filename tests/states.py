"""Checkpoints for tests: states that show which step they are of, and where their bytes lie."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from xylem.training.checkpoint import Checkpoints

CONFIG = {"config": {"model": {"d_model": 24}}, "tokenizer": "0" * 64}


@struct.dataclass
class State:
    step: jax.Array
    trainable: dict
    frozen: dict
    optimizer: tuple
    rng: jax.Array


def make_state(step: int, width: int = 5, dtype=jnp.float32) -> State:
    """A state whose every array is a function of the step: what is restored shows which save it came from."""
    keys = jax.random.split(jax.random.key(step), 3)
    up = jax.random.normal(keys[0], (2, 24, width)).astype(dtype)
    trainable = {"layers": {"mlp": {"up": {"kernel": up, "bias": None}}}, "positions": {}}
    frozen = {"layers": {"mlp": {"up": {"kernel": None, "bias": jax.random.normal(keys[1], (2, width), jnp.bfloat16)}}}}
    optimizer = optax.adamw(1e-3).init(trainable)
    return State(jnp.int32(step), trainable, frozen, optimizer, jax.random.key_data(keys[2]))


def save(folder: Path, *steps: int, **options) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"position": 7 * step}, CONFIG) is None


def assert_equal(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def payload(folder: Path, step: int) -> Path:
    """The largest file of arrays."""
    return max((folder / f"{step:08d}" / "arrays").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(folder: Path) -> str:
    """Flip one bit of the arrays of step 20; what is then said about it."""
    path = payload(folder, 20)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    return "is damaged (its SHA-256 differs)"
