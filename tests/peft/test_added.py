"""What is added to a layer, beside float64 NumPy: adapters behind its sublayers, prefixes where all may look."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import FAMILIES, SETTINGS, B, S, T, method_of, moved, texts
from operations import apart, normal
from small import random_weights

from xylem import models
from xylem.models import fused
from xylem.models.attention import Attention, Context, CrossAttention
from xylem.models.conversion import flatten
from xylem.models.masks import Mask
from xylem.models.settings import Compute
from xylem.peft.config import BitFitConfig, PrefixConfig
from xylem.peft.methods import bitfit, prefix

BAR, P = 1e-5, 4


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def adapter(x, weights):
    """A small network with GELU (its tanh form), and what it read."""
    inner = x @ weights["down"]["kernel"] + weights["down"]["bias"]
    inner = inner * (1 + np.tanh((2 / np.pi) ** 0.5 * (inner + 0.044715 * inner**3))) / 2
    return x + inner @ weights["up"]["kernel"] + weights["up"]["bias"]


def layer_norm(x, weights, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights["scale"] + weights["bias"]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_adapters_stand_behind_sublayers_and_before_the_sum(family, rng_seed, proof):
    config = dataclasses.replace(FAMILIES[family], num_layers=1).with_compute(Compute(layers="scan", kernels="plain"))
    module = models.build(config).clone(taps=("embed", "attention_out", "mlp_out", "block_out"))
    keys, method = jax.random.split(jax.random.key(rng_seed), 3), method_of("houlsby")
    params = method.graft(random_weights(module, keys[0], jnp.zeros((1, 2), jnp.int32)), keys[1], SETTINGS["houlsby"])
    params = moved(params, method.trainable(params, SETTINGS["houlsby"]), keys[2])
    taps = wide(module.apply({"params": params}, texts(family, rng_seed)["tokens"]).taps)
    layer = wide(jax.tree.map(lambda x: x[0], params["layers"]))
    h, attended, fed = taps["embed"], taps["attention_out"][0], taps["mlp_out"][0]

    def block(behind_the_sum: bool):
        norm = lambda name, x: layer_norm(x, layer[name], config.norm_eps) if family == "bert" else x  # noqa: E731
        add = lambda h, x, name: (  # noqa: E731
            adapter(h + x, layer[name]) if behind_the_sum else h + adapter(x, layer[name])
        )
        first = norm("attention_norm", add(h, attended, "attention_adapter"))
        return norm("mlp_norm", add(first, fed, "mlp_adapter"))

    found = taps["block_out"][0]
    assert apart([found], [block(behind_the_sum=True)]) > 1e-2
    error = apart([found], [block(behind_the_sum=False)])
    proof(f"adapters of {family}", "NumPy", error, BAR, rng_seed, "behind the residual sum")


@pytest.mark.parametrize(
    ("family", "side", "site"),
    [("bert", None, "attention"), ("t5", "encoder", "attention"), ("t5", "decoder", "cross_attention")],
)
def test_a_prefix_is_seen_by_every_query(family, side, site, rng_seed, proof):
    rng, whole = np.random.default_rng(rng_seed), FAMILIES[family]
    config = getattr(whole, side) if side else whole
    base = random_weights(models.build(whole), jax.random.key(rng_seed), jnp.zeros((1, 2), jnp.int32))
    grafted = prefix.graft(base, jax.random.key(rng_seed), PrefixConfig(P, hidden=0, std=0.5))
    weights = jax.tree.map(lambda x: x[1], (grafted[side] if side else grafted)["layers"][site])
    x, memory = normal(rng, B, T, config.d_model), normal(rng, B, S, config.d_model)
    everything = Mask(causal=False)
    if site == "attention":
        read, layer = x, Attention(config, fused.PLAIN)
        context = Context(everything.behind(P, B), None, None, None)
    else:
        read, layer = memory, CrossAttention(config, fused.PLAIN)
        context = Context(everything, None, None, None, memory, everything.behind(P, B))
    out = layer.apply({"params": weights}, x, context, None, 0)
    out = out[0] if site == "attention" else out
    x, read, weights = wide((x, read, weights))

    def dense(name, x):
        return x @ weights[name]["kernel"] + weights[name].get("bias", 0.0)

    def expected(before):
        query, key, value = dense("query", x), dense("key", read), dense("value", read)
        made = np.zeros_like(query)
        for row in range(B):
            keys, values = (np.concatenate(pair) for pair in zip(before, (key[row], value[row]), strict=True))
            for head in range(config.num_heads):
                own = slice(head * config.head_dim, (head + 1) * config.head_dim)
                scores = query[row][:, own] @ keys[:, own].T
                scores /= config.head_dim**0.5 if config.attention.scale == "head_dim" else 1.0
                shares = np.exp(scores - scores.max(-1, keepdims=True))
                made[row][:, own] = shares / shares.sum(-1, keepdims=True) @ values[:, own]
        return dense("output", made)

    key, value = weights["prefix"]["key"], weights["prefix"]["value"]
    assert apart([out], [expected((value, key))]) > 1e-2
    row = f"a prefix at {' '.join(filter(None, (family, side, site)))}"
    proof(row, "NumPy", apart([out], [expected((key, value))]), BAR, rng_seed, "keys and values exchanged")


@pytest.mark.parametrize(
    ("family", "more"), [("gpt2", ["final_norm/bias"]), ("bert", ["embed_norm/bias", "head/norm/bias"])]
)
def test_bitfit_teaches_these_biases_and_no_other(family, more, rng_seed):
    base = random_weights(models.build(FAMILIES[family]), jax.random.key(rng_seed), jnp.zeros((1, 2), jnp.int32))
    learns = bitfit.trainable(base, BitFitConfig())
    inside = [*(f"attention/{name}" for name in ("query", "key", "value", "output")), "mlp/up", "mlp/down"]
    written = {f"layers/{name}/bias" for name in (*inside, "attention_norm", "mlp_norm")} | set(more)
    assert {path for path, leaf in flatten(base).items() if learns(path, leaf)} == written
