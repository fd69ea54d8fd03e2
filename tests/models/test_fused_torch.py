"""Hand-written derivatives against torch's autograd in float64, each with a fault that the comparison catches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import BAR, apart, normal, product, with_gradients

from xylem.models import fused, fused_attention
from xylem.models.fused_cross_entropy import cross_entropy
from xylem.models.masks import Mask


def torch_with_gradients(function, args, rng_seed: int):
    """What ``with_gradients`` gives, by torch's autograd in float64: the reference's own rounding is out of the way."""
    import torch

    rng = np.random.default_rng(rng_seed)
    leaves = [torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in args]
    out = function(*leaves)
    out.backward(torch.tensor(np.asarray(normal(rng, *out.shape)), dtype=torch.float64))
    return out.detach().numpy(), tuple(leaf.grad.numpy() for leaf in leaves)


def hold(proof, row, oracle, ours, faulty, reference, args, seed, mutation) -> None:
    """Error of ours within the bar, of the faulty one beyond it; recorded."""
    expected = torch_with_gradients(reference, args, seed)
    assert apart(with_gradients(jax.jit(faulty), args, seed), expected) > BAR
    proof(row, oracle, apart(with_gradients(jax.jit(ours), args, seed), expected), BAR, seed, mutation)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_fused_norms_equal_torch(name, rng_seed, proof):
    from torch.nn import functional

    rng = np.random.default_rng(rng_seed)
    m, d = (int(n) for n in rng.integers(5, 60, 2))
    eps, x = float(10 ** rng.uniform(-4, -2)), normal(rng, m, d, std=0.3) + 0.2
    weights = (normal(rng, d),) if name == "rms_norm" else (normal(rng, d), normal(rng, d))
    ours = getattr(fused, name)
    hold(
        proof,
        f"fused {name}, forward and gradients",
        f"torch.nn.functional.{name}",
        lambda *a: ours(*a, eps),
        lambda *a: ours(*a, 1.5 * eps),
        lambda x, *w: getattr(functional, name)(x, (d,), *w, eps=eps),
        (x, *weights),
        rng_seed,
        "eps times 1.5",
    )


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu"])
def test_fused_activations_equal_torch(name, rng_seed, proof):
    from torch.nn import functional

    rng = np.random.default_rng(rng_seed)
    x = normal(rng, int(rng.integers(5, 60)), int(rng.integers(5, 60)), std=2.0)
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "silu": "gelu", "relu": "silu"}[name]
    gelu = {"gelu": "none", "gelu_tanh": "tanh"}
    reference = partial(functional.gelu, approximate=gelu[name]) if name in gelu else getattr(functional, name)
    ours, faulty = partial(fused.activation, name), partial(fused.activation, other)
    oracle = f"torch.nn.functional.{name.removesuffix('_tanh')}"
    row = f"fused {name}, forward and gradient"
    hold(proof, row, oracle, ours, faulty, reference, (x,), rng_seed, f"{other} in its place")


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_fused_gates_equal_torch(name, rng_seed, proof):
    from torch.nn import functional

    rng = np.random.default_rng(rng_seed)
    m, f = (int(n) for n in rng.integers(5, 60, 2))
    act = functional.silu if name == "swiglu" else partial(functional.gelu, approximate="tanh")
    hold(
        proof,
        f"fused {name}, forward and gradients",
        f"torch.nn.functional.{'silu' if name == 'swiglu' else 'gelu'} and a product",
        partial(fused.gated, name),
        lambda gate, up: fused.gated(name, up, gate),
        lambda gate, up: act(gate) * up,
        (normal(rng, m, f, std=2.0), normal(rng, m, f)),
        rng_seed,
        "gate and up exchanged",
    )


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["causal", "window", "segments", "prefix"])
def test_fused_attention_equals_torch(kind, rng_seed, proof):
    import torch
    from torch.nn import functional

    rng = np.random.default_rng(rng_seed)
    kv_heads, group, head_dim = int(rng.integers(2, 4)), int(rng.integers(2, 4)), int(rng.integers(3, 9))
    length, chunk = int(rng.integers(11, 40)), int(rng.integers(3, 12))
    query = normal(rng, 3, length, kv_heads * group, head_dim)
    key, value = (normal(rng, 3, length, kv_heads, head_dim) for _ in range(2))
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    segments, prefix = np.sort(rng.integers(1, 4, (3, length))), rng.integers(2, 9, 3)
    seen = np.broadcast_to(j <= i, (3, length, length))
    fault = None
    if kind == "causal":
        mask = Mask()
    elif kind == "window":
        mask, seen = Mask(window=5), seen & (j > i - 5)
        fault = Mask(window=6)
    elif kind == "segments":
        ids = jnp.asarray(segments, jnp.int32)
        mask, seen = Mask(query_segments=ids, key_segments=ids), seen & (segments[:, :, None] == segments[:, None])
        fault = Mask()
    else:
        mask, seen = Mask(prefix=jnp.asarray(prefix, jnp.int32)), seen | (j < prefix[:, None, None])
        fault = Mask(prefix=jnp.asarray(prefix + 1, jnp.int32))

    def reference(query, key, value):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        out = functional.scaled_dot_product_attention(query, key, value, torch.tensor(seen)[:, None], scale=0.37)
        return out.transpose(1, 2)

    def faulty(query, key, value):
        if fault is not None:
            return fused_attention.attention(query, key, value, fault, 0.37, chunk)
        turned = jnp.arange(kv_heads * group).reshape(kv_heads, group).T.reshape(-1)
        return fused_attention.attention(query[:, :, turned], key, value, mask, 0.37, chunk)

    hold(
        proof,
        f"fused attention ({kind}, grouped heads), forward and gradients",
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *a: fused_attention.attention(*a, mask, 0.37, chunk),
        faulty,
        reference,
        (query, key, value),
        rng_seed,
        {
            "causal": "query head n meets key head n % K",
            "window": "a window longer by 1",
            "segments": "segments ignored",
            "prefix": "a prefix longer by 1",
        }[kind],
    )


@pytest.mark.oracle
@pytest.mark.parametrize("mutation", ["no label smoothing", "no z-loss", "labels one step late"])
def test_fused_cross_entropy_equals_torch(mutation, rng_seed, proof):
    import torch
    from torch.nn import functional

    rng = np.random.default_rng(rng_seed)
    batch, length, width, vocab = (int(n) for n in rng.integers([2, 9, 3, 20], [5, 30, 9, 60]))
    smoothing, z_loss, chunk = float(rng.uniform(0.05, 0.3)), float(rng.uniform(1e-3, 1e-1)), int(rng.integers(2, 8))
    labels = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    args = normal(rng, width, vocab), normal(rng, batch, length, width), jnp.abs(normal(rng, batch, length))

    def ours(kernel, hidden, weights, labels=labels, smoothing=smoothing, z_loss=z_loss):
        out = cross_entropy(product, kernel, hidden, labels, weights, smoothing, z_loss, chunk)
        return out[0]

    def reference(kernel, hidden, weights):
        logits = hidden @ kernel
        target = torch.tensor(np.asarray(labels)).long()
        loss = functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=smoothing
        )
        return ((loss + z_loss * logits.logsumexp(-1).flatten() ** 2) * weights.flatten()).sum()

    faulty = {
        "no label smoothing": partial(ours, smoothing=0.0),
        "no z-loss": partial(ours, z_loss=0.0),
        "labels one step late": partial(ours, labels=jnp.roll(labels, 1, axis=1)),
    }[mutation]
    row = "fused cross-entropy (smoothing, z-loss, chunked), forward and gradients"
    hold(proof, row, "torch.nn.functional.cross_entropy", ours, faulty, reference, args, rng_seed, mutation)
