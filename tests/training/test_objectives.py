"""The loss: torch's cross-entropy on the same logits, real tokens only, fused as plain."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart

from xylem import models
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.models.settings import Compute
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import Sums, causal_lm

B, T, V = 3, 13, 31
PLAIN = Compute(layers="scan", kernels="plain")
BOTH = ObjectiveConfig(label_smoothing=0.13, z_loss=0.07)
FLOOR = 1e-2  # a key's bias shifts every score alike: its gradient is rounding, 1e-7 of the largest
CONFIGS = {
    "gpt": replace(gpt(2, 20, 5, V, 17), compute=PLAIN),
    "llama": replace(llama(2, 24, 6, 3, 29, V, 17, rope_theta=777.0, norm_eps=1e-4), compute=PLAIN),
}


@partial(jax.jit, static_argnames="module")
def init(module, key):
    params = module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noise = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noise)


@partial(jax.jit, static_argnames=("module", "config"))
def value_and_gradient(module, config, params, batch):
    """Sums, and the gradient of the summed loss."""

    def loss(params):
        sums = causal_lm(module, config, params, batch)
        return sums.loss, sums

    return jax.grad(loss, has_aux=True)(params)


@partial(jax.jit, static_argnames="module")
def logits_and_pull(module, params, batch, cotangent):
    """Logits, and what a gradient by the logits is by the parameters."""
    apply = lambda p: module.apply({"params": p}, batch["tokens"], segments=batch["segments"]).logits  # noqa: E731
    logits, pull = jax.vjp(apply, params)
    return logits, pull(cotangent)[0]


def random_batch(rng: np.random.Generator) -> dict:
    """Two documents a row and padding behind them; labels of weight 0 hold the value that torch ignores."""
    segments = np.zeros((B, T), np.int32)
    for row in segments:
        first, stop = sorted(rng.choice(np.arange(2, T - 1), 2, replace=False))
        row[:first], row[first:stop] = 1, 2
    weights = ((segments > 0) & (rng.random((B, T)) < 0.8)).astype(np.float32)
    labels = np.where(weights > 0, rng.integers(0, V, (B, T)), -100).astype(np.int32)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    return {"tokens": tokens, "labels": labels, "segments": segments, "weights": weights}


@pytest.fixture(params=["gpt", "llama"])
def case(request, rng_seed):
    module = models.build(CONFIGS[request.param])
    return module, init(module, jax.random.key(rng_seed)), random_batch(np.random.default_rng(rng_seed))


@pytest.mark.oracle
@pytest.mark.parametrize("config", [ObjectiveConfig(), BOTH], ids=["plain", "smoothed with z-loss"])
def test_causal_lm_equals_torch_cross_entropy(case, config, rng_seed, proof):
    import torch

    module, params, batch = case
    gradient, ours = value_and_gradient(module, config, params, batch)
    zeros = jnp.zeros((B, T, V))
    logits = torch.from_numpy(np.array(logits_and_pull(module, params, batch, zeros)[0])).requires_grad_()

    def reference(labels):
        flat, target = logits.flatten(0, 1), torch.from_numpy(labels.astype(np.int64)).flatten()
        options = {"reduction": "sum", "label_smoothing": config.label_smoothing}
        entropy = torch.nn.functional.cross_entropy(flat, target, **options)
        return entropy + config.z_loss * (flat.logsumexp(-1) ** 2)[target >= 0].sum()

    loss = reference(batch["labels"])
    loss.backward()
    expected = logits_and_pull(module, params, batch, jnp.asarray(logits.grad.numpy()))[1]
    loss = float(loss.detach())
    assert abs(float(ours.loss) / loss - 1) <= 1e-6
    error = apart(gradient, jax.tree.map(np.asarray, expected), FLOOR)
    assert float(ours.weight) == batch["weights"].sum()
    nll = torch.nn.functional.cross_entropy(
        logits.detach().flatten(0, 1), torch.from_numpy(batch["labels"].astype(np.int64)).flatten(), reduction="sum"
    )
    assert abs(float(ours.nll) / float(nll) - 1) < 1e-5
    unmasked = float(reference(np.maximum(batch["labels"], 0)).detach())
    assert abs(float(ours.loss) / unmasked - 1) > 1e-3
    name = f"{module.config.family} causal LM loss and gradient"
    name += ", label smoothing and z-loss" if config == BOTH else ""
    proof(name, "torch F.cross_entropy", error, 1e-4, rng_seed, "labels of weight 0 counted")


def test_causal_lm_reads_real_tokens_alone(case):
    module, params, batch = case
    ours = value_and_gradient(module, BOTH, params, batch)
    padding = batch["segments"] == 0
    changed = batch | {
        "tokens": np.where(padding, (batch["tokens"] + 7) % V, batch["tokens"]),
        "labels": np.where(batch["weights"] == 0, 5, batch["labels"]),
    }
    again = value_and_gradient(module, BOTH, params, changed)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_causal_lm_is_the_same_fused(case):
    module, params, batch = case
    config = replace(module.config, compute=Compute(layers="scan", kernels="fused"))
    gradient, sums = value_and_gradient(module, BOTH, params, batch)
    fused_gradient, fused_sums = value_and_gradient(models.build(config), BOTH, params, batch)
    assert apart(fused_gradient, jax.tree.map(np.asarray, gradient), FLOOR) <= 1e-4
    assert apart(fused_sums, jax.tree.map(np.asarray, sums), FLOOR) <= 1e-6


def test_sums_of_parts_add_up_to_the_sums_of_the_whole(case):
    module, params, batch = case
    whole = value_and_gradient(module, BOTH, params, batch)[1]
    only = lambda row: np.where(np.arange(B)[:, None] == row, batch["weights"], 0.0)  # noqa: E731
    parts = [value_and_gradient(module, BOTH, params, batch | {"weights": only(row)})[1] for row in range(B)]
    added = jax.tree.map(lambda *each: sum(each), *parts)
    assert isinstance(added, Sums)
    assert apart(added, jax.tree.map(np.asarray, whole), FLOOR) <= 1e-6
