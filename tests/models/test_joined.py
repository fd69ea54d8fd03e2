"""Joined kernels: the same function in fewer products, and leaves left alone."""

import jax
import jax.numpy as jnp
from operations import apart
from small import B, T, apply, logits

from xylem.models.conversion import flatten
from xylem.models.joined import fuse
from xylem.models.leaves import Quantized
from xylem.peft import tree
from xylem.sharding import param_specs

BAR = 1e-5  # the same sums in another order: 1.1e-6 was the most of a layer's rounding over the seeds of many runs


def edited(params, *names: str, change):
    """The tree with one layer's weight replaced by ``change`` of it."""
    *parents, last = names
    if not parents:
        return {**params, last: change(params[last])}
    return {**params, names[0]: edited(params[names[0]], *names[1:], change=change)}


def test_joined_kernels_are_the_same_network(case, proof, rng_seed):
    config, module, params, tokens = case
    joined = fuse(params)
    assert joined["layers"]["attention"].keys() == {"query_key_value", "output"}
    assert joined["layers"]["mlp"].keys() == ({"up_gate", "down"} if config.gated else {"up", "down"})
    assert tree.count(joined) == tree.count(params)
    apart_before = logits(module, params, tokens)
    kernel = ("layers", "attention", "query_key_value", "kernel")
    reversed_heads = edited(joined, *kernel, change=lambda w: w[..., ::-1])
    assert apart(logits(module, reversed_heads, tokens), apart_before) > BAR
    error = apart(logits(module, joined, tokens), apart_before)
    row = f"joined query, key, value and up, gate ({config.family})"
    proof(row, "the kernels apart", error, BAR, rng_seed, "joined columns reversed")


def test_joined_kernels_decode_and_shard(case):
    _, module, params, tokens = case
    joined = fuse(tree.split(params, at=1))
    assert joined["layers_1"]["attention"].keys() == {"query_key_value", "output"}
    out = apply(module, joined, tokens[:, :5], cache=module.init_cache(B, T))
    out = apply(module, joined, tokens[:, 5:], cache=out.cache)
    assert apart(out.logits, logits(module, params, tokens)[:, 5:]) <= 1e-5
    specs = flatten(param_specs(joined))
    assert specs["layers_0/attention/query_key_value/kernel"] == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


def test_groups_with_a_leaf_stay_apart(case):
    _, module, params, tokens = case
    quantized = edited(params, "layers", "attention", "key", "kernel", change=jax.vmap(Quantized.quantize))
    joined = fuse(quantized)
    assert joined["layers"]["attention"].keys() == params["layers"]["attention"].keys()
    assert bool(jnp.isfinite(logits(module, joined, tokens)).all())
