"""Three families in a size that compiles at once, with every dimension another."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from xylem.models.config import RopeScaling, TransformerConfig
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.models.mamba import mamba
from xylem.models.state_config import MambaConfig
from xylem.sharding import path_name

B, T = 3, 13


def small(family: str) -> TransformerConfig:
    if family == "gpt":
        return gpt(num_layers=3, d_model=20, num_heads=5, vocab_size=31, max_length=17)
    config = llama(3, 24, 6, 3, d_ff=29, vocab_size=31, max_length=17, rope_theta=777.0, norm_eps=1e-4)
    return with_positions(config, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 8))


def small_mamba(**values) -> MambaConfig:
    config = mamba(3, 10, vocab_size=31, max_length=40, state_size=5, conv_width=3, dt_rank=4)
    return dataclasses.replace(config, **{"d_inner": 22, "norm_eps": 1e-4, **values})


def with_positions(config: TransformerConfig, **values) -> TransformerConfig:
    """The config with some values of its ``positions`` replaced."""
    return dataclasses.replace(config, positions=dataclasses.replace(config.positions, **values))


@partial(jax.jit, static_argnames="module")
def init(module, key, tokens):
    return module.init(key, tokens)["params"]


@partial(jax.jit, static_argnames=("module", "train"))
def apply(module, params, tokens, **kwargs):
    return module.apply({"params": params}, tokens, **kwargs)


def logits(module, params, tokens, **kwargs):
    return apply(module, params, tokens, **kwargs).logits


def random_weights(module, key, tokens):
    """Random weights near zero, or near ``STARTS``, and away from these special values: nothing hides behind a zero or
    a one. In NumPy: a program that draws them takes longer to compile than most tests."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def draw(path, x):
        start = next((start(x) for ending, start in STARTS.items() if path_name(path).endswith(ending)), 0.0)
        return jnp.asarray(start + 0.2 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, _shapes(module, tokens.shape))


@lru_cache
def _shapes(module, shape):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape, jnp.int32))["params"]


STARTS = {
    "scale": lambda _: 1.0,
    "mixer/A_log": lambda x: np.log(np.arange(1, x.shape[-1] + 1)),
    "mixer/D": lambda _: 1.0,
    "mixer/delta/bias": lambda _: -4.7,
}
