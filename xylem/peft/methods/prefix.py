"""Prefix-tuning (2101.00190): keys and values that no token made stand in front of every layer's own.

While they learn they may be computed by a small network from embeddings (section 4.3: learned directly they are
unstable), ``fold`` being what computes them; in the end only they are kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.stack import run_length, runs
from xylem.peft.config import PrefixConfig
from xylem.peft.tree import Predicate, Tree, check_absent

SITES = ("attention", "cross_attention")


def graft(params: Tree, key: PRNGKeyArray, config: PrefixConfig) -> Tree:
    """The tree with a prefix at every attention: in its layers, or as a ``prefix`` node beside them to be folded.

    Raises:
        ConfigError: a network without attention, or with a prefix already.
    """
    check_absent(params, "prefix", "prefix")
    sides = {name: params[name] for name in ("encoder", "decoder") if name in params}
    if sides:
        keys = jax.random.split(key, len(sides))
        return params | {name: graft(sides[name], own, config) for name, own in zip(sides, keys, strict=True)}
    sites = [site for site in SITES if runs(params) and site in params[runs(params)[0]]]
    if not sites:
        scans = any("mixer" in params[name] for name in runs(params))
        instead = "; a Mamba has states instead, which the method state teaches" if scans else ""
        raise ConfigError("method", "prefix", f"keys and values are attention's{instead}", ["state"] if scans else [])
    made, grown = {}, params
    for site, own in zip(sites, jax.random.split(key, len(sites)), strict=True):
        kernel = params[runs(params)[0]][site]["key"]["kernel"]
        width, layers = kernel.shape[-1], sum(run_length(params[name]) for name in runs(params))
        if config.hidden:
            made[site] = _network(own, config, kernel.shape[-2], 2 * layers * width, kernel.dtype)
        else:
            drawn = config.std * jax.random.normal(own, (2, layers, config.length, width), kernel.dtype)
            grown = _placed(grown, site, drawn)
    return {**grown, "prefix": made} if made else grown


def _network(key: PRNGKeyArray, config: PrefixConfig, width: int, outputs: int, dtype: Any) -> Tree:
    """Embeddings and two layers."""
    keys = jax.random.split(key, 3)

    def linear(key: PRNGKeyArray, inputs: int, outputs: int) -> Tree:
        kernel = config.std * jax.random.normal(key, (inputs, outputs), dtype)
        return {"kernel": kernel, "bias": jnp.zeros(outputs, dtype)}

    return {
        "embedding": jax.random.normal(keys[0], (config.length, width), dtype),
        "up": linear(keys[1], width, config.hidden),
        "down": linear(keys[2], config.hidden, outputs),
    }


def fold(params: Tree) -> Tree:
    """The tree with the prefixes that its networks compute in their places, and without the networks."""
    folded = {name: fold(params[name]) for name in ("encoder", "decoder") if name in params}
    params = params | folded
    if "prefix" not in params:
        return params
    layers = sum(run_length(params[name]) for name in runs(params))
    grown = {name: part for name, part in params.items() if name != "prefix"}
    for site, net in params["prefix"].items():
        inner = jnp.tanh(net["embedding"] @ net["up"]["kernel"] + net["up"]["bias"][None])
        flat = inner @ net["down"]["kernel"] + net["down"]["bias"][None]
        grown = _placed(grown, site, rearrange(flat, "P (L two E) -> two L P E", L=layers, two=2))
    return grown


def _placed(params: Tree, site: str, prefix: Float[Array, "two L P E"]) -> Tree:
    """The stack with keys and values for each layer at a site."""
    start, grown = 0, dict(params)
    for name in runs(params):
        stop = start + run_length(params[name])
        held = {"key": prefix[0, start:stop], "value": prefix[1, start:stop]}
        grown[name] = {**params[name], site: {**params[name][site], "prefix": held}}
        start, params = stop, grown
    return grown


def trainable(params: Tree, config: PrefixConfig) -> Predicate:
    """The prefixes, or what computes them."""
    return lambda path, _: "prefix" in path.split("/")
