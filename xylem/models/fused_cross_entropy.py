"""Cross-entropy by chunks of the sequence, with a hand-written derivative, beside its plain twin (see ``fused.py``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

F32 = jnp.float32
fresh = jax.lax.optimization_barrier

Head = Callable[[Any, Array], Array]


def cross_entropy_plain(
    head: Head,
    head_params: Any,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    label_smoothing: float,
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over all tokens of the training loss and of the negative log-likelihood, in nats.

    loss = (1 - s) * nll + s * (mean over the vocabulary of -log p) + z * logsumexp^2, with label smoothing s
    (1512.00567, section 7) and z-loss z (2204.02311, section 5). ``head(head_params, hidden)`` gives float32 logits.
    A label outside the vocabulary is harmless where its weight is 0. The second sum carries no gradient.
    """
    logits = head(head_params, hidden)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    nll = log_sum - jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_sum - logits.mean(-1)) + z_loss * jnp.square(log_sum)
    return (loss * weights).sum(), jax.lax.stop_gradient((nll * weights).sum())


def cross_entropy(
    head: Head,
    head_params: Any,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    label_smoothing: float,
    z_loss: float,
    chunk: int | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``cross_entropy_plain`` by chunks of ``chunk`` positions (None: all at once), gradient made in the forward pass.

    The derivative by the logits is known in closed form, so each chunk's logits are used and dropped: one head product
    forward, two backward, never recomputed; peak memory is B * chunk * V. Frozen ``head_params`` cost no product, and
    where no gradient is asked none is made. ``head`` is given flattened tokens (M, D) and must be a function of its
    arguments alone.
    """
    static = (head, label_smoothing, z_loss, chunk)
    sums: Any = _cross_entropy(static, head_params, hidden, labels, weights)
    return sums[0], jax.lax.stop_gradient(sums[1])


def _token_losses(logits, labels, smoothing, z_loss):
    """Loss, negative log-likelihood, log-sum-exp of each token, and its softmax as (numerators, denominator)."""
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    # No less than one of its own row: this makes the exponentials wait for the look-up and then take the logits' place.
    peak = jnp.maximum(logits.max(-1), picked)
    raised = jnp.exp(logits - peak[..., None])
    # A product on CPUs, where XLA takes sums of rows in one thread; accelerators would round its factors.
    total = jax.lax.platform_dependent(
        raised, cpu=lambda x: x @ jnp.ones(x.shape[-1], F32), default=lambda x: x.sum(-1)
    )
    log_sum = peak + jnp.log(total)
    nll = log_sum - picked
    loss = nll if smoothing == 0.0 else (1.0 - smoothing) * nll + smoothing * (log_sum - logits.mean(-1))
    return loss if z_loss == 0.0 else loss + z_loss * jnp.square(log_sum), nll, log_sum, (raised, total)


def _over_chunks(step: Callable, carry: Any, arrays: list[Array], chunk: int | None) -> tuple[Any, list[Array]]:
    """``carry, outs = step(carry, tokens)`` over chunks of the T axis, the last perhaps shorter; outs are rejoined.

    The batch axis stays whole, so one that is sharded stays sharded; a step sees the tokens of its chunk flattened.
    """
    batch, length = arrays[0].shape[:2]
    chunk = length if chunk is None else min(chunk, length)

    def flat(carry, piece):
        carry, outs = step(carry, [rearrange(x, "B T ... -> (B T) ...") for x in piece])
        return carry, [rearrange(x, "(B T) ... -> B T ...", B=batch) for x in outs]

    whole = length // chunk * chunk
    pieces = [rearrange(x[:, :whole], "B (C T) ... -> C B T ...", T=chunk) for x in arrays]
    carry, outs = jax.lax.scan(flat, carry, pieces)
    outs = [rearrange(x, "C B T ... -> B (C T) ...") for x in outs]
    if whole < length:
        carry, rest = flat(carry, [x[:, whole:] for x in arrays])
        outs = [jnp.concatenate(pair, axis=1) for pair in zip(outs, rest, strict=True)]
    return carry, outs


def _sums(static, apply, chosen, pieces, with_gradient):
    """(loss, nll) over all chunks; with the gradients of the first by ``chosen``, by hidden and by weights if asked.

    ``apply(chosen, hidden)`` gives the logits of flattened tokens; ``pieces`` are hidden, labels and weights.
    """
    _, smoothing, z_loss, chunk = static

    def step(carry, piece):
        (loss_sum, nll_sum, grads), (hidden, labels, weights) = carry, piece
        logits, pull = jax.vjp(apply, chosen, hidden) if with_gradient else (apply(chosen, hidden), None)
        loss, nll, log_sum, (raised, total) = _token_losses(logits, labels, smoothing, z_loss)
        loss_sum, nll_sum = loss_sum + (loss * weights).sum(), nll_sum + (nll * weights).sum()
        if pull is None:
            return (loss_sum, nll_sum, grads), []
        slope = raised / total[..., None]
        if z_loss != 0.0:
            slope = slope * (1.0 + 2.0 * z_loss * log_sum[..., None])
        is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[..., None]
        slope = slope - jnp.where(is_label, 1.0 - smoothing, 0.0)
        if smoothing != 0.0:
            slope = slope - smoothing / logits.shape[-1]
        dchosen, dhidden = pull(slope * weights[..., None])
        grads = [total + new.astype(F32) for total, new in zip(grads, dchosen, strict=True)]
        return (loss_sum, nll_sum, grads), [dhidden, loss]

    zero = jnp.zeros((), F32)
    start = (zero, zero, [jnp.zeros(value.shape, F32) for value in chosen if with_gradient])
    (loss_sum, nll_sum, grads), slopes = _over_chunks(step, start, pieces, chunk)
    return (loss_sum, nll_sum), grads, slopes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, head_params, hidden, labels, weights):
    return _sums(static, static[0], head_params, [hidden, labels, weights], with_gradient=False)[0]


def _cross_entropy_forward(static, head_params, *pieces):
    leaves, tree = jax.tree.flatten(head_params)  # each with .value and .perturbed: symbolic_zeros=True below
    learned = [leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact) for leaf in leaves]
    chosen = [leaf.value for leaf, yes in zip(leaves, learned, strict=True) if yes]

    def merged(chosen, others):
        chosen = iter(chosen)
        return jax.tree.unflatten(tree, [next(chosen) if yes else x for x, yes in zip(others, learned, strict=True)])

    def apply(chosen, hidden):
        return static[0](merged(chosen, [leaf.value for leaf in leaves]), hidden)

    sums, grads, (dhidden, loss) = _sums(static, apply, chosen, [x.value for x in pieces], with_gradient=True)
    grads = [grad.astype(value.dtype) for grad, value in zip(grads, chosen, strict=True)]
    return sums, (merged(grads, [None] * len(leaves)), dhidden, loss)


def _cross_entropy_backward(static, saved, g):
    dparams, dhidden, loss = saved
    g = jnp.zeros((), F32) if isinstance(g[0], SymbolicZero) else g[0]
    dparams = jax.tree.map(lambda x: (x * g).astype(x.dtype), dparams)
    return dparams, (dhidden * g).astype(dhidden.dtype), None, loss * g


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)
