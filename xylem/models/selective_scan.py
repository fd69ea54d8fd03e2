"""The selective scan of Mamba (2312.00752, section 3.2 and algorithm 2), in four forms that compute the same.

Each inner channel has Z states, which decay and take in the channel's input at a rate of their own at every token::

    h[t] = decay[t] * h[t - 1] + weight[t] * x[t] * B[t]        decay[t] = exp(delta[t] A)
    y[t] = C[t] . h[t] + D * x[t]                               weight[t] = delta[t]  (or by zero-order hold)

- ``sequential``: this definition, one token after the other: what the others are held against.
- ``parallel``: an associative scan over all tokens; it writes every state of every token, log T times.
- ``chunked``: sequential, and only the states between chunks are kept: the backward pass computes those of one chunk
  again and pulls the gradient back through it. One row after the other, so that a row's states stay in the cache.
- ``kernel``: the same in one Pallas kernel each way, for TPUs and GPUs (``selective_scan_pallas.py``).

States lie with channels last, (Z, I): channels fill the lanes of vector units, states need no gathering.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xylem.models.cudnn_attention import nvidia_generation
from xylem.models.selective_scan_pallas import kernel
from xylem.models.settings import Compute
from xylem.sharding import by_parts

F32 = jnp.float32
CHUNK = 32  # tokens between kept states; 16 takes 7% longer on a Zen 4, 64 as long

Rule = Literal["euler", "zoh"]
Form = Literal["sequential", "parallel", "chunked", "kernel"]


def selective_scan(
    x: Float[Array, "B T I"],
    delta: Float[Array, "B T I"],
    A: Float[Array, "I Z"],
    B: Float[Array, "B T Z"],
    C: Float[Array, "B T Z"],
    D: Float[Array, "I"],
    *,
    start: Float[Array, "B Z I"] | None = None,
    keep: Float[Array, "B T"] | None = None,
    rule: Rule = "euler",
    form: Form = "sequential",
) -> tuple[Float[Array, "B T I"], Float[Array, "B Z I"]]:
    """Outputs in the type of ``x``, and the float32 states after the last token; all is computed in float32.

    Args:
        delta: step sizes, positive; where one is 0 the token leaves no trace in the states.
        A: negative.
        start: states before the first token; zeros unless given.
        keep: 0 where a token begins a document, so that states of the one before are dropped, 1 elsewhere. No gradient.
        rule: weight by ``euler`` (delta) or ``zoh``, the exact zero-order hold ((exp(delta A) - 1) / A).
        form: how; the result does not depend on it.
    """
    batch, length, inner = x.shape
    start = jnp.zeros((batch, A.shape[1], inner), F32) if start is None else start
    keep = jnp.ones((batch, length), F32) if keep is None else jax.lax.stop_gradient(keep)
    rows, columns = ("batch", None, "tensor"), ("batch", None, None)
    inputs = (rows, rows, (None, "tensor"), columns, columns, ("batch", None), rows)
    run = by_parts(partial(FORMS[form], rule), inputs, outputs=(rows, rows))
    y, last = run(*(value.astype(F32) for value in (x, delta, A.T, B, C, keep, start)))
    return (y + D.astype(F32)[None, None] * x.astype(F32)).astype(x.dtype), last


def left_of(
    start: Float[Array, "Z I"],
    delta: Float[Array, "B T I"],
    A: Float[Array, "I Z"],
    C: Float[Array, "B T Z"],
    keep: Float[Array, "B T"] | None,
) -> Float[Array, "B T I"]:
    """What is added to each output where every document begins with the states ``start``: the scan is linear in them.

    ``sum over z of C[t, z] exp(A[z] s[t]) start[z]``, s[t] being the steps of the document until then: no recurrence,
    and nothing of size (B, T, Z, I). Arguments as in ``selective_scan``; all is computed in float32.
    """
    steps, same = delta.astype(F32), jnp.ones((1, delta.shape[1]), F32) if keep is None else keep

    def follow(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        return one[0] * other[0], other[1] + other[0] * one[1]

    # Sums within documents: differences of sums over the row would lose the digits of late ones.
    elapsed = jax.lax.associative_scan(follow, (same[..., None], steps), axis=1)[1]

    @jax.checkpoint
    def add(total: Array, state: tuple[Array, Array, Array]) -> tuple[Array, None]:
        begin, rate, read = state
        return total + read[..., None] * jnp.exp(rate[None, None] * elapsed) * begin[None, None], None

    states = start.astype(F32), A.T.astype(F32), jnp.moveaxis(C.astype(F32), -1, 0)
    return jax.lax.scan(add, jnp.zeros_like(steps), states)[0]


def discretize(rule: Rule, delta: Float[Array, "I"], A: Float[Array, "Z I"]) -> tuple[Array, Array]:
    """Decay (Z, I) and input weight (1 or Z, I) of one token."""
    exponent = delta[None] * A
    return jnp.exp(exponent), delta[None] if rule == "euler" else jnp.expm1(exponent) / A


def advance(rule: Rule, A: Array, h: Float[Array, "Z I"], x: Array, delta: Array, B: Array, keep: Array) -> Array:
    """The states after one token."""
    decay, weight = discretize(rule, delta, A)
    return keep * decay * h + (weight * x[None]) * B[:, None]


# --- sequential -------------------------------------------------------------------------------------------------------


def _run(rule: Rule, A: Array, x: Array, delta: Array, B: Array, C: Array, keep: Array, start: Array):
    """Outputs and last states of one row, token by token."""

    def step(h, token):
        x, delta, B, C, keep = token
        h = advance(rule, A, h, x, delta, B, keep)
        return h, C @ h

    last, y = jax.lax.scan(step, start, (x, delta, B, C, keep))
    return y, last


def sequential(rule: Rule, x: Array, delta: Array, A: Array, *rest: Array) -> tuple[Array, Array]:
    """The definition."""
    return jax.vmap(partial(_run, rule, A))(x, delta, *rest)


# --- parallel ---------------------------------------------------------------------------------------------------------


def parallel(
    rule: Rule, x: Array, delta: Array, A: Array, B: Array, C: Array, keep: Array, start: Array
) -> tuple[Array, Array]:
    """The recurrence as composition of affine maps, which is associative (Blelloch 1990, section 1.4)."""
    decay, weight = jax.vmap(jax.vmap(partial(discretize, rule), (0, None)), (0, None))(delta, A)
    decay = decay * keep[..., None, None]
    taken = weight * x[:, :, None] * B[..., None]

    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, h = jax.lax.associative_scan(compose, (decay, taken), axis=1)
    h = h + decay * start[:, None]
    return jnp.einsum("btz,btzi->bti", C, h), h[:, -1]


# --- chunked ----------------------------------------------------------------------------------------------------------


def chunked(
    rule: Rule, x: Array, delta: Array, A: Array, B: Array, C: Array, keep: Array, start: Array
) -> tuple[Array, Array]:
    """Sequential by chunks of ``CHUNK`` tokens, with a derivative that keeps one state a chunk."""
    length = x.shape[1]
    size = min(CHUNK, length)
    # Steps of size 0 fill the last chunk: they leave the states as they are.
    fill = lambda value: jnp.pad(value, [(0, 0), (0, -length % size)] + [(0, 0)] * (value.ndim - 2))  # noqa: E731
    out: Any = _chunked(rule, size, A, start, fill(x), fill(delta), fill(B), fill(C), jnp.pad(
        keep, [(0, 0), (0, -length % size)], constant_values=1.0))  # fmt: skip
    return out[0][:, :length], out[1]


def _cut(size: int, values: Any) -> Any:
    """The tokens of one row as (chunks, size, ...)."""
    return jax.tree.map(lambda value: value.reshape(-1, size, *value.shape[1:]), values)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(rule: Rule, size: int, A: Array, start: Array, *tokens: Array) -> tuple[Array, Array]:
    return _chunked_forward(rule, size, A, start, *tokens)[0]


def _chunked_forward(rule: Rule, size: int, A: Array, start: Array, *tokens: Array) -> Any:
    def row(start, *tokens):
        def chunk(h, part):
            x, delta, B, C, keep = part
            y, last = _run(rule, A, x, delta, B, C, keep, h)
            return last, (y, h)

        last, (y, before) = jax.lax.scan(chunk, start, _cut(size, tokens))
        return y.reshape(-1, y.shape[-1]), last, before

    y, last, before = jax.lax.map(lambda each: row(*each), (start, *tokens))
    return (y, last), (A, before, tokens)


def _chunked_backward(rule, size, saved, slopes):
    A, before, tokens = saved
    pull = _pull_euler if rule == "euler" else partial(_pull_derived, rule)

    def row(before, dy, dlast, *tokens):
        def chunk(carry, part):
            dh, dA = carry
            before, dy, tokens = part
            dA, dh, dtokens = pull(A, before, tokens, dy, dh, dA)
            return (dh, dA), dtokens

        parts = before, *_cut(size, (dy, tokens))
        (dstart, dA), dtokens = jax.lax.scan(chunk, (dlast, jnp.zeros_like(A)), parts, reverse=True)
        return dA, dstart, [value.reshape(-1, value.shape[-1]) for value in dtokens]

    dA, dstart, dtokens = jax.lax.map(lambda each: row(*each), (before, *slopes, *tokens))
    return dA.sum(0), dstart, *dtokens, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _pull_derived(rule, A, before, tokens, dy, dh, dA):
    """Gradients of one chunk, as jax derives them: of A (added to ``dA``), of the states before, and of its tokens."""
    *tokens, keep = tokens
    run = lambda A, before, x, delta, B, C: _run(rule, A, x, delta, B, C, keep, before)  # noqa: E731
    more, dbefore, *dtokens = jax.vjp(run, A, before, *tokens)[1]((dy, dh))
    return dA + more, dbefore, dtokens


def _pull_euler(A, before, tokens, dy, dh, dA):
    """``_pull_derived`` for ``euler``, written out so that each array of states is read as few times as XLA allows.

    Backwards from the last token, with g the gradient of the states after it, u = delta x, and q = g (h - u B) the
    gradient of the exponent delta A::

        g = C dy + g'               du = B . g                  dA = dA + q delta
        dC = h dy    dB = g u       ddelta = A . q + du x       g' = g decay             dx = du delta
    """
    x, delta, B, C, keep = tokens
    u, decay = delta * x, keep[:, None, None] * jnp.exp(delta[:, None] * A[None])

    def forward(h, token):
        u, decay, B = token
        h = decay * h + u[None] * B[:, None]
        return h, h

    def back(carry, token):
        g, dA = carry
        x, delta, u, decay, B, C, dy, h = token
        g = g + C[:, None] * dy[None]
        du, q = B @ g, g * (h - u[None] * B[:, None])
        return (g * decay, dA + q * delta[None]), (du * delta, (q * A).sum(0) + du * x, g @ u)

    _, h = jax.lax.scan(forward, before, (u, decay, B))
    (dh, dA), dtokens = jax.lax.scan(back, (dh, dA), (x, delta, u, decay, B, C, dy, h), reverse=True)
    return dA, dh, (*dtokens, jnp.einsum("tzi,ti->tz", h, dy))


# --- which to use -----------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "sequential": sequential,
    "parallel": parallel,
    "chunked": chunked,
    "kernel": kernel,
}


# The form from each length on. cpu: two Zen 4 threads, jaxlib 0.10.2 (benchmarks/README.md), where chunked took the
# least time at every length tried, 16 to 1,024; one token alone needs no chunk. gpu: one H200, jaxlib 0.11.2, 2 x 2,048
# tokens, 1,024 channels: the kernel's step takes 27 ms, chunked 697; parallel was not measured there. It is lowered by
# Triton, of which jax 0.12 warns that Pallas will leave it. For a TPU v5e, on which no time was measured, the kernel is
# compiled in the tests and asks for no main memory of its own where ``parallel`` asks for 5.7 GB (2 x 2,048 tokens,
# 1,536 channels).
MEASURED: dict[str, tuple[tuple[int, Form], ...]] = {
    "cpu": ((1, "sequential"), (16, "chunked")),
    "tpu": ((1, "sequential"), (64, "kernel")),
    "gpu": ((1, "sequential"), (64, "kernel")),
}
UNMEASURED: tuple[tuple[int, Form], ...] = ((1, "sequential"), (64, "parallel"))


def choose(compute: Compute, backend: str, length: int) -> Form:
    """``compute.scan``, with ``auto`` settled: by ``backend`` and ``length``, or the definition for plain kernels."""
    if compute.scan != "auto":
        return compute.scan
    if compute.kernels == "plain":
        return "sequential"
    known = backend != "gpu" or nvidia_generation() >= 8
    table = MEASURED.get(backend, UNMEASURED) if known else UNMEASURED
    return next(form for least, form in reversed(table) if length >= least)
