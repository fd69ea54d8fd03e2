"""Hand-written derivatives for what XLA makes slow, on CPUs above all, each beside its plain twin.

``<name>_plain`` is the readable definition and the oracle of the tests; ``<name>`` computes the same with a
``jax.custom_vjp``. Three things are slow on XLA:CPU and are avoided here: gradients of (B, T, D) products, which are
rematerialised transposed (so tokens are flattened to M = B * T); intermediates that autodiff stores for norms,
activations and softmax (so only inputs and row statistics are kept); and the T x T and T x V arrays of attention and
cross-entropy, so both go by chunks, in ``fused_attention.py`` and ``fused_cross_entropy.py``. Nothing else in the
models knows how: ``choose`` says per backend what to call.

Reverse mode only: ``jax.jvp`` through these raises, ``kernels="plain"`` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from xylem.models.config import RopeScaling
from xylem.models.positions import rope_tables as plain_rope_tables
from xylem.models.settings import Compute

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


def low_rank_plain(
    x: Float[Array, "M I"], w: Float[Array, "I O"], a: Float[Array, "I R"], b: Float[Array, "R O"]
) -> Float[Array, "M O"]:
    """``x @ w + (x @ a) @ b``: LoRA's product (2106.09685, section 4.1), its scale in ``b``."""
    return x @ w + (x @ a) @ b


@jax.custom_vjp
def low_rank(
    x: Float[Array, "M I"], w: Float[Array, "I O"], a: Float[Array, "I R"], b: Float[Array, "R O"]
) -> Float[Array, "M O"]:
    """``low_rank_plain`` as one product with ``w + a @ b``, forward and for the gradient of ``x``.

    For many rows: the sum is then a pass over a weight, not over all rows. In float32 alone: a lower precision would
    round small changes of ``w`` away.
    """
    return x @ (w + a @ b)


def _low_rank_backward(saved, g):
    x, w, a, b = saved
    dx, dw = _matmul_backward((x, w + a @ b), g)  # XLA leaves dw out where w is frozen
    within, across = (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
    da = jax.lax.dot_general(x, jax.lax.dot_general(g, b, within), across)
    return dx, dw, da, jax.lax.dot_general(x @ a, g, across)


low_rank.defvjp(lambda x, w, a, b: (low_rank(x, w, a, b), (x, w, a, b)), _low_rank_backward)


FEW = 128


def few_rows_plain(x: Float[Array, "M I"], w: Float[Array, "O I"]) -> Float32[Array, "M O"]:
    """``x @ w.T``, by a matrix that is held as its transpose: summed and kept in float32, whatever the type of both."""
    return jnp.einsum("mi,oi->mo", x, w, preferred_element_type=F32)


def few_rows(x: Float[Array, "M I"], w: Float[Array, "O I"]) -> Float32[Array, "M O"]:
    """``few_rows_plain`` as ``(w @ x.T).T`` where there are at most ``FEW`` rows: XLA:CPU wants the longer side first.

    Rows of 768 by (2304, 768), two Zen 1 threads of 73 GFLOP/s at most, jaxlib 0.10.2, GFLOP/s of ``x @ v`` (v = w.T,
    stored), ``x @ w.T`` and this: 11.6, 6.8, 12.5 for 2 rows, 36, 22, 42 for 8, 34, 45, 66 for 32, 66, 65, 69 for 128,
    71, 70, 64 for 256. In bfloat16 two Zen 4 threads, 170 in float32, reach 270 for 32 rows and 350 from 128 on, but
    1 for a single row, which is therefore read twice.
    """
    if len(x) == 1 and x.dtype == jnp.bfloat16:
        return few_rows(jnp.repeat(x, 2, axis=0), w)[:1]
    if len(x) > FEW:
        return few_rows_plain(x, w)
    return fresh(jnp.einsum("oi,mi->om", w, x, preferred_element_type=F32)).T  # else XLA exchanges the sides


def wide_product_plain(x: Float[Array, "*B I"], w: Float[Array, "..."], transposed: bool) -> Float[Array, "*B O"]:
    """``x @ w``, or ``x @ w.T`` where ``w`` is ``transposed``: summed and kept in float32, whatever the type of x."""
    equation = "...i,oi->...o" if transposed else "...i,io->...o"
    return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=F32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def wide_product(x: Float[Array, "*B I"], w: Float[Array, "..."], transposed: bool) -> Float[Array, "*B O"]:
    """``wide_product_plain``, for whose gradients slopes are rounded to the type of ``x``, as torch's autocast does.

    What jax derives are products of float32: of twice the bytes, and on a GPU half as fast.
    """
    return wide_product_plain(x, w, transposed)


def _wide_backward(transposed, saved, g):
    x, w = saved
    g = g.astype(x.dtype)
    rows, slopes = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    by_w = (slopes, rows) if transposed else (rows, slopes)
    dw = jnp.einsum("mi,mo->io", *by_w, preferred_element_type=F32)
    return jnp.einsum("...o,oi->...i" if transposed else "...o,io->...i", g, w.astype(x.dtype)), dw.astype(w.dtype)


wide_product.defvjp(lambda x, w, transposed: (wide_product_plain(x, w, transposed), (x, w)), _wide_backward)


# --- bias -------------------------------------------------------------------------------------------------------------


def add_bias_plain(x: Float[Array, "M O"], bias: Float[Array, "O"]) -> Float[Array, "M O"]:
    """``x + bias``, in the type of ``x``."""
    return x + bias.astype(x.dtype)[None]


@jax.custom_vjp
def add_bias(x: Float[Array, "M O"], bias: Float[Array, "O"]) -> Float[Array, "M O"]:
    """``add_bias_plain``, whose gradient by the bias is a product with ones: XLA:CPU sums over many long rows in one
    thread (512 rows of 30,522: 72 ms against 1.4)."""
    return add_bias_plain(x, bias)


def _bias_backward(bias, g):
    ones = jnp.ones(g.shape[0], g.dtype)
    return g, jnp.matmul(ones, g, preferred_element_type=F32).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias_plain(x, bias), bias), _bias_backward)


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


# --- which to use -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What the model text calls on one backend: each operation here (True) or its plain twin (False), and sizes.

    Attributes:
        unroll: compile every layer, or one that is scanned over.
        attention: ``chunked`` for ``fused_attention``, ``cudnn`` for ``cudnn_attention``, else ``plain``.
        attention_chunk: queries a chunk of the first.
        loss_logits: the most logits ``cross_entropy`` holds at once.
        wide_product: for the head, where its input is not float32.
    """

    unroll: bool
    matmul: bool
    norm: bool
    activation: bool
    rope: bool
    attention: Literal["plain", "chunked", "cudnn"]
    attention_chunk: int
    cross_entropy: bool
    loss_logits: int
    wide_product: bool = False

    def loss_chunk(self, batch: int, length: int, vocab_size: int) -> int | None:
        """Positions a chunk of ``cross_entropy``; None where all logits fit at once."""
        most = max(1, self.loss_logits // (batch * vocab_size))
        if most >= length:
            return None
        # A chunk that divides the length leaves no shorter last one to compile; half as long is worth that.
        return next((chunk for chunk in range(most, most // 2, -1) if length % chunk == 0), most)


def _all(fused: bool, unroll: bool, attention_chunk: int, loss_logits: int) -> Choice:
    attention = "chunked" if fused else "plain"
    return Choice(unroll, fused, fused, fused, fused, attention, attention_chunk, fused, loss_logits)


PLAIN = _all(fused=False, unroll=False, attention_chunk=0, loss_logits=0)
# cpu: two Zen 4 threads, jaxlib 0.10.2, 2026-11-23, full AdamW steps, sides interleaved (benchmarks/train_step.py).
# Scanned layers took 8 to 9% longer than unrolled ones. Chunks of 128 queries beat 256 by 2 to 4% and equal 64. With a
# vocabulary of 50,304 each halving of the logits from 2**26 on costs 1.5%, since the head's gradient is added up once a
# chunk; so many leave a step at 2.3 GB (nanoGPT 6.1).
# gpu: one H200, jaxlib 0.11.2, 2026-11-27, the same steps in bfloat16: GPT-2's of 16 x 1,024 tokens take 60 ms scanned,
# 44 unrolled, 38 with ``wide_product``; 81 with all that is fused for CPUs (scanned). In float32 nothing was measured.
MEASURED = {
    "cpu": _all(fused=True, unroll=True, attention_chunk=128, loss_logits=2**26),
    "gpu": replace(PLAIN, unroll=True, attention="cudnn", cross_entropy=True, loss_logits=2**28, wide_product=True),
}


def choose(compute: Compute, backend: str) -> Choice:
    """``compute`` with every ``auto`` settled: what was measured fastest on ``backend``, plain where nothing was."""
    measured = MEASURED.get(backend, PLAIN)
    choice = {"auto": measured, "plain": PLAIN, "fused": MEASURED["cpu"]}[compute.kernels]
    # Unrolled, XLA:CPU starts the recomputation of remat early and keeps it: no memory is saved (measured).
    unroll = measured.unroll and compute.remat == "none"
    return replace(choice, unroll=unroll if compute.layers == "auto" else compute.layers == "unroll")
