"""What the tests of the fused operations share: random arguments, gradients, and how far two results are apart."""

import jax
import jax.numpy as jnp
import numpy as np

BAR = 1e-5  # float32, sums of at most a few hundred terms


def normal(rng: np.random.Generator, *shape: int, std: float = 1.0) -> jax.Array:
    return jnp.asarray(std * rng.standard_normal(shape), jnp.float32)


def apart(ours, reference, floor: float = 0.0) -> float:
    """The worst of two trees' leaves: largest difference over the reference's largest magnitude.

    A leaf whose magnitude is below ``floor`` times that of the largest leaf is held to ``floor`` of it: it may be
    nothing but rounding (the gradient of a key's bias).
    """
    ours, reference = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (ours, reference))
    assert [x.shape for x in ours] == [x.shape for x in reference]
    sizes = [float(np.max(np.abs(y))) for y in reference]
    least = max(floor * max(sizes), 1e-30)
    differences = [float(np.max(np.abs(x - y))) for x, y in zip(ours, reference, strict=True)]
    # np.max: unlike Python's, it never passes over a NaN.
    return float(np.max(np.asarray(differences) / np.maximum(sizes, least)))


def with_gradients(function, args, rng_seed: int):
    """Outputs and all gradients, for a random cotangent that only the seed decides."""
    rng = np.random.default_rng(rng_seed)
    out, pull = jax.vjp(function, *args)
    return out, pull(jax.tree.map(lambda x: normal(rng, *x.shape).astype(x.dtype), out))


def head(params: dict, hidden: jax.Array) -> jax.Array:
    """A head with a bias, whose third leaf holds whole numbers as a quantized one would."""
    assert params["code"].dtype == jnp.int8
    return (hidden @ params["kernel"]).astype(jnp.float32) + jnp.broadcast_to(
        params["bias"], (*hidden.shape[:-1], params["bias"].shape[0])
    )


def product(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """The plainest head."""
    return hidden @ kernel


def cross_entropy_case(rng: np.random.Generator, batch: int = 2, length: int = 11, vocab: int = 13):
    """Head parameters, hidden states, labels (some -100 where the weight is 0) and weights."""
    params = {"kernel": normal(rng, 5, vocab), "bias": normal(rng, vocab), "code": jnp.ones((3,), jnp.int8)}
    weights = jnp.asarray(rng.integers(0, 3, (batch, length)) / 2.0, jnp.float32)
    labels = jnp.where(weights > 0, jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32), -100)
    return params, normal(rng, batch, length, 5), labels, weights


def scan_loop(rule: str, x, delta, A, B, C, D, start, keep, begin=0.0):
    """The selective scan by definition, in float64 or complex128: outputs and last states.

    ``start`` are the states before a row's first token, ``begin`` those before a document's (``keep`` is 0 there).
    """
    h, outputs = np.array(start), []
    for t in range(x.shape[1]):
        h = np.where(keep[:, t, None, None] > 0, h, begin)
        exponent = delta[:, t, None, :] * A.T
        weight = delta[:, t, None, :] if rule == "euler" else np.expm1(exponent) / A.T
        h = np.exp(exponent) * h + weight * x[:, t, None, :] * B[:, t, :, None]
        outputs.append(np.einsum("bz,bzi->bi", C[:, t], h) + D * x[:, t])
    return np.stack(outputs, axis=1), h
