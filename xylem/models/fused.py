"""Hand-written derivatives for what XLA:CPU makes slow, each beside its plain twin.

``<name>_plain`` is the readable definition and the oracle of the tests; ``<name>`` computes the same with a
``jax.custom_vjp``. Three things are slow on XLA:CPU and are avoided here: gradients of (B, T, D) products, which are
rematerialised transposed (so tokens are flattened to M = B * T); intermediates that autodiff stores for norms,
activations and softmax (so only inputs and row statistics are kept); and the T x T and T x V arrays of attention and
cross-entropy (so both go by chunks; attention is in ``fused_attention.py``). Nothing else in the models knows how:
``choose`` says per backend what to call.

Reverse mode only: ``jax.jvp`` through these raises, ``kernels="plain"`` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from xylem.models.config import Compute, RopeScaling
from xylem.models.positions import rope_tables as plain_rope_tables

F32 = jnp.float32
# Where layers are unrolled, forward and backward are one program, and XLA would merge what the backward pass recomputes
# from the inputs with what the forward pass had: written out once, read twice. This makes it recompute.
fresh = jax.lax.optimization_barrier


# --- matrix product ---------------------------------------------------------------------------------------------------


def matmul_plain(x: Float[Array, "M I"], w: Float[Array, "I O"]) -> Float[Array, "M O"]:
    """``x @ w``."""
    return x @ w


@jax.custom_vjp
def matmul(x: Float[Array, "M I"], w: Float[Array, "I O"]) -> Float[Array, "M O"]:
    """``x @ w``, whose two gradients are one product each and transpose nothing in memory."""
    return x @ w


def _matmul_backward(saved, g):
    x, w = saved
    dx = jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())))
    dw = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))
    return dx, dw


matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_backward)


# --- norms ------------------------------------------------------------------------------------------------------------


def layer_norm_plain(
    x: Float[Array, "M D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float
) -> Float[Array, "M D"]:
    """LayerNorm (1607.06450, section 3.1) over the last axis: statistics in float32, output in ``x.dtype``."""
    wide = x.astype(F32)
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (normal * scale.astype(F32)[None] + bias.astype(F32)[None]).astype(x.dtype)


def rms_norm_plain(x: Float[Array, "M D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "M D"]:
    """RMSNorm (1910.07467, section 4) over the last axis: statistics in float32, output in ``x.dtype``."""
    wide = x.astype(F32)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (normal * scale.astype(F32)[None]).astype(x.dtype)


def layer_norm(
    x: Float[Array, "M D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float
) -> Float[Array, "M D"]:
    """``layer_norm_plain``, keeping ``x`` and two numbers a row."""
    return _norm(eps, x, scale, bias)


def rms_norm(x: Float[Array, "M D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "M D"]:
    """``rms_norm_plain``, keeping ``x`` and one number a row."""
    return _norm(eps, x, scale, None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(eps, x, scale, bias):
    return _norm_forward(eps, x, scale, bias)[0]


def _norm_forward(eps, x, scale, bias):
    """With a bias LayerNorm, without one RMSNorm, which takes the mean for 0."""
    wide = x.astype(F32)
    mean = None if bias is None else wide.mean(-1, keepdims=True)
    centred = wide if mean is None else wide - mean
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    out = centred * inverse * scale.astype(F32)[None]
    out = out if bias is None else out + bias.astype(F32)[None]
    return out.astype(x.dtype), (x, scale, bias, mean, inverse)


def _norm_backward(eps, saved, g):
    x, scale, bias, mean, inverse = fresh(saved)
    wide, g = x.astype(F32), g.astype(F32)
    normal = (wide if mean is None else wide - mean) * inverse
    inner = g * scale.astype(F32)[None]
    dx = inner - normal * (inner * normal).mean(-1, keepdims=True)
    dx = dx if mean is None else dx - inner.mean(-1, keepdims=True)
    dbias = None if bias is None else g.sum(0).astype(bias.dtype)
    return (inverse * dx).astype(x.dtype), (g * normal).sum(0).astype(scale.dtype), dbias


_norm.defvjp(_norm_forward, _norm_backward)


# --- activations ------------------------------------------------------------------------------------------------------

GELU_TANH = (math.sqrt(2.0 / math.pi), 0.044715)  # 1606.08415, section 2: the tanh approximation


def _gelu(x):
    below = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
    return x * below, below + x * jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))


def _gelu_tanh(x):
    slope, cubic = GELU_TANH
    t = jnp.tanh(slope * (x + cubic * x * x * x))
    return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope * (1.0 + 3.0 * cubic * x * x)


def _silu(x):
    s = jax.nn.sigmoid(x)
    return x * s, s * (1.0 + x * (1.0 - s))


def _relu(x):
    return jnp.maximum(x, 0.0), (x > 0).astype(x.dtype)


# name -> (the definition, value and derivative written out)
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (partial(jax.nn.gelu, approximate=False), _gelu),
    "gelu_tanh": (partial(jax.nn.gelu, approximate=True), _gelu_tanh),
    "silu": (jax.nn.silu, _silu),
    "relu": (jax.nn.relu, _relu),
}
GATES = {"swiglu": "silu", "geglu": "gelu_tanh"}  # 2002.05202, section 2; the approximation as in Gemma and T5 v1.1


def activation_plain(name: str, x: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """``gelu`` (exact), ``gelu_tanh``, ``silu`` or ``relu``; computed in float32, returned in ``x.dtype``."""
    return ACTIVATIONS[name][0](x.astype(F32)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def activation(name: str, x: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """``activation_plain``, keeping ``x`` alone."""
    return ACTIVATIONS[name][1](x.astype(F32))[0].astype(x.dtype)


def _activation_backward(name, x, g):
    x = fresh(x)
    return ((g.astype(F32) * ACTIVATIONS[name][1](x.astype(F32))[1]).astype(x.dtype),)


activation.defvjp(lambda name, x: (activation(name, x), x), _activation_backward)


def gated_plain(name: str, gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """``silu(gate) * up`` for ``swiglu``, ``gelu_tanh(gate) * up`` for ``geglu``; computed in float32."""
    return (ACTIVATIONS[GATES[name]][0](gate.astype(F32)) * up.astype(F32)).astype(gate.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(name: str, gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """``gated_plain``, keeping ``gate`` and ``up`` alone."""
    return (ACTIVATIONS[GATES[name]][1](gate.astype(F32))[0] * up.astype(F32)).astype(gate.dtype)


def _gated_backward(name, saved, g):
    (gate, up), again, g = fresh(saved), fresh(saved[0]), g.astype(F32)
    slope, value = ACTIVATIONS[GATES[name]][1](gate.astype(F32))[1], ACTIVATIONS[GATES[name]][1](again.astype(F32))[0]
    return (g * up.astype(F32) * slope).astype(gate.dtype), (g * value).astype(up.dtype)


gated.defvjp(lambda name, gate, up: (gated(name, gate, up), (gate, up)), _gated_backward)


# --- rotary tables ----------------------------------------------------------------------------------------------------


def rope_tables(
    positions: Int[Array, "#B T"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float[Array, "#B T h"], Float[Array, "#B T h"]]:
    """``positions.rope_tables``, its plain twin, behind a conditional that always holds.

    XLA:CPU fuses the sines into every rotation of every layer, forward and backward, and drops barriers before it does
    (5% of a LLaMA step); into a branch of a conditional it does not reach.
    """
    always = fresh(positions).reshape(-1)[0] >= 0
    zeros = jnp.zeros((*positions.shape, head_dim // 2), F32)
    return jax.lax.cond(always, lambda: plain_rope_tables(positions, head_dim, theta, scaling), lambda: (zeros, zeros))


# --- cross-entropy ----------------------------------------------------------------------------------------------------

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
    total = raised @ jnp.ones(logits.shape[-1], F32)  # a product: XLA:CPU takes sums of rows in one thread
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


# --- which to use -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What the model text calls on one backend: each operation here (True) or its plain twin (False), and sizes.

    Attributes:
        unroll: compile every layer, or one that is scanned over.
        attention_chunk: queries a chunk of ``fused_attention.attention``.
        loss_logits: the most logits ``cross_entropy`` holds at once.
    """

    unroll: bool
    matmul: bool
    norm: bool
    activation: bool
    rope: bool
    attention: bool
    attention_chunk: int
    cross_entropy: bool
    loss_logits: int

    def loss_chunk(self, batch: int, length: int, vocab_size: int) -> int | None:
        """Positions a chunk of ``cross_entropy``; None where all logits fit at once."""
        most = max(1, self.loss_logits // (batch * vocab_size))
        if most >= length:
            return None
        # A chunk that divides the length leaves no shorter last one to compile; half as long is worth that.
        return next((chunk for chunk in range(most, most // 2, -1) if length % chunk == 0), most)


def _all(fused: bool, unroll: bool, attention_chunk: int, loss_logits: int) -> Choice:
    return Choice(unroll, fused, fused, fused, fused, fused, attention_chunk, fused, loss_logits)


PLAIN = _all(fused=False, unroll=False, attention_chunk=0, loss_logits=0)
# cpu: two Zen 4 threads, jaxlib 0.10.2, 2026-11-23, full AdamW steps, sides interleaved (benchmarks/train_step.py).
# Scanned layers took 8 to 9% longer than unrolled ones. Chunks of 128 queries beat 256 by 2 to 4% and equal 64. With a
# vocabulary of 50,304 each halving of the logits from 2**26 on costs 1.5%, since the head's gradient is added up once a
# chunk; so many leave a step at 2.3 GB (nanoGPT 6.1).
MEASURED = {"cpu": _all(fused=True, unroll=True, attention_chunk=128, loss_logits=2**26)}


def choose(compute: Compute, backend: str) -> Choice:
    """``compute`` with every ``auto`` settled: what was measured fastest on ``backend``, plain where nothing was."""
    measured = MEASURED.get(backend, PLAIN)
    choice = {"auto": measured, "plain": PLAIN, "fused": MEASURED["cpu"]}[compute.kernels]
    # Unrolled, XLA:CPU starts the recomputation of remat early and keeps it: no memory is saved (measured).
    unroll = measured.unroll and compute.remat == "none"
    return replace(choice, unroll=unroll if compute.layers == "auto" else compute.layers == "unroll")
