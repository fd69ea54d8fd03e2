"""Three families in a size that compiles at once, with every dimension another."""

import dataclasses
from functools import partial

import jax

from xylem.models.config import RopeScaling, TransformerConfig
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.models.mamba import mamba
from xylem.models.state_config import MambaConfig

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


@jax.jit
def randomise(params, key):
    """Every weight away from its special starting value, so that nothing hides behind a zero or a one."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noise = [x + 0.2 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noise)
