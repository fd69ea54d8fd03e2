"""The Mamba block, and the language model built of a stack of them (2312.00752, section 3.4).

::

    h ── norm ─┬─ input ─ conv ─ silu ─┬─ selective scan ─(x)─ output ─(+)── h'
               │                       └─ delta, B, C ──┘  │           │
               └─ gate ─ silu ─────────────────────────────┘      h ───┘

How layers are stored, scanned, tapped and intervened in is told in ``stack.py``, the scan in ``selective_scan.py``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xylem.models import fused
from xylem.models.cache import StateCache
from xylem.models.fused import Choice
from xylem.models.language_model import Head, LanguageModel, Output
from xylem.models.layers import Adapter, Dense, Embed, Norm, Site, add_bias, einsum, parameter, side_by_side
from xylem.models.leaves import bias_of
from xylem.models.selective_scan import choose, left_of, selective_scan
from xylem.models.stack import Sites, layer_runs, scan_layers
from xylem.models.state_config import MambaConfig
from xylem.models.virtual import Text, prepend, prompt_of
from xylem.sharding import constrain

F32 = jnp.float32


class Context(struct.PyTreeNode):
    """What every layer of one call shares.

    Attributes:
        segments: which document each token belongs to, where documents are packed; None where a row is one.
        real: which tokens are real, where a cache is given padding on the right; None where all are.
        rng: of dropout, of which there is none.
    """

    segments: Int[Array, "B T"] | None
    real: Bool[Array, "B T"] | None
    rng: PRNGKeyArray | None = None
    train: bool = struct.field(pytree_node=False, default=False)


class Block(nn.Module):
    """One layer: a mixer behind a norm, added to the stream, which stays in float32 (as in the released code)."""

    config: MambaConfig
    kernels: Choice

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"], context: Context, cache: StateCache | None, layer: Any, site: Any):
        config, kernels = self.config, self.kernels
        x = Norm(config, kernels, name="mixer_norm")(h).astype(config.compute.dtype)
        x, cache = Mixer(config, kernels, name="mixer")(x, context, cache, layer, site)
        x = site("mixer_out", x)
        if self.has_variable("params", "mixer_adapter"):
            x = Adapter(name="mixer_adapter")(x)
        return site("block_out", constrain(h + x.astype(F32), "batch", None, None)), cache


class Mixer(nn.Module):
    """What moves information along the sequence: convolution, selective scan, gate.

    With a cache its state is ``{"conv": the last W - 1 inputs of the convolution, "ssm": the scan's states}``. Where
    the tree holds ``start`` (Z, I), every document begins with these states, and so does a row of a cache that has read
    nothing.
    """

    config: MambaConfig
    kernels: Choice

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: StateCache | None, layer: Any, site: Site
    ) -> tuple[Float[Array, "B T D"], StateCache | None]:
        config, kernels, inner = self.config, self.kernels, self.config.d_inner
        silu = partial(fused.activation if kernels.activation else fused.activation_plain, "silu")
        gated = partial(fused.gated if kernels.activation else fused.gated_plain, "swiglu")
        dense = lambda name, width: Dense(width, config.init.selection, config, kernels, name=name)  # noqa: E731
        flat = lambda y: y.reshape(-1, inner)  # noqa: E731

        state: dict[str, Any] = {"conv": None, "ssm": None} if cache is None else cache.read(layer)
        x, gate = side_by_side(self, "input_gate", {"input": inner, "gate": inner}, x, config, kernels)
        x, window = CausalConv(config, name="conv")(x, context.segments, state["conv"])
        x = silu(flat(x)).reshape(x.shape)
        low, B, C = dense("low", config.dt_rank)(x), dense("B", config.state_size)(x), dense("C", config.state_size)(x)
        delta = StepSize(config, kernels, name="delta")(low)
        if context.real is not None:
            delta = delta * context.real[..., None]  # padding takes no step: it leaves the states as they are
        A = -jnp.exp(parameter(self, "A_log", _log_counting, (inner, config.state_size), "float32").astype(F32))
        D = parameter(self, "D", None, (inner,), "float32", fill=1.0)
        keep = None if context.segments is None else _same_document(context.segments, 1).astype(F32)
        form = choose(config.compute, jax.default_backend(), x.shape[1])
        scan = partial(selective_scan, A=A, D=D, rule=config.discretization, form=form)
        start = self.get_variable("params", "start") if self.has_variable("params", "start") else None
        if cache is None:
            y, _ = scan(x, delta, B=B, C=C, keep=keep)
            y = y if start is None else (y + left_of(start, delta, A, C, keep)).astype(y.dtype)
        else:
            if start is not None:
                state["ssm"] = jnp.where((cache.lengths == 0)[:, None, None], start[None], state["ssm"])
            trail = min(x.shape[1], cache.history + 1)
            y, states = _scan_and_trail(scan, x, delta, B, C, state["ssm"], trail)
            padded = None if context.real is None else ~context.real.all(1)
            windows = _windows(window, context.real, x.shape[1], trail)
            cache = cache.update(layer, {"conv": windows, "ssm": states}, padded)
        y = site("mixer_inner", gated(flat(gate), flat(y)).reshape(y.shape))
        return Dense(config.d_model, config.init.residual, config, kernels, name="output")(y), cache


class CausalConv(nn.Module):
    """A convolution along the sequence, each channel by itself: ``y[t] = sum over w of kernel[w] x[t - W + 1 + w]``."""

    config: MambaConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T I"], segments: Int[Array, "B T"] | None, before: Float[Array, "B W I"] | None
    ) -> tuple[Float[Array, "B T I"], Float[Array, "B S I"]]:
        """``before`` are the inputs in front of the first (zeros unless given); of another document none is seen.

        Also returns all inputs, those in front included.
        """
        (batch, length, inner), width = x.shape, self.config.conv_width
        stored, bound = self.config.compute.param_dtype, self.config.init.conv
        kernel: Any = parameter(self, "kernel", _uniform(bound), (width, inner), stored).astype(F32)
        bias: Any = parameter(self, "bias", None, (inner,), stored).astype(F32)
        before = jnp.zeros((batch, width - 1, inner), x.dtype) if before is None else before
        inputs = jnp.concatenate([before, x], axis=1)
        y = jnp.zeros(x.shape, F32)
        for tap in range(width):
            seen, back = inputs[:, tap : tap + length].astype(F32), width - 1 - tap
            if segments is not None and back:
                seen = jnp.where(_same_document(segments, back)[..., None], seen, 0.0)
            y = y + seen * kernel[tap][None, None]
        return add_bias(y, bias).astype(x.dtype), inputs


class StepSize(nn.Module):
    """``softplus(low @ kernel + bias)`` in float32: how far each channel's states move at each token."""

    config: MambaConfig
    kernels: Choice

    @nn.compact
    def __call__(self, low: Float[Array, "B T R"]) -> Float[Array, "B T I"]:
        init, inner, stored = self.config.init, self.config.d_inner, self.config.compute.param_dtype
        kernel = parameter(self, "kernel", _uniform(init.delta), (low.shape[-1], inner), stored)

        def step_bias(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
            """The inverse softplus of log-uniform step sizes."""
            low, high = math.log(init.delta_min), math.log(init.delta_max)
            step = jnp.exp(jax.random.uniform(key, shape, F32, low, high))
            step = jnp.maximum(step, init.delta_floor)
            return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)

        bias: Any = parameter(self, "bias", step_bias, (inner,), stored)
        step = einsum("...i,io->...o", low, kernel, self.kernels).astype(F32)
        return jax.nn.softplus(add_bias(step, bias_of(kernel, bias)))


class MambaLM(LanguageModel):
    """A decoder-only language model of Mamba blocks.

    ``params`` hold ``embed``, the runs of ``layers``, ``final_norm`` and, when it is not tied to the embedding,
    ``head``.
    """

    config: MambaConfig

    SITES: ClassVar = ("embed", "mixer_inner", "mixer_out", "block_out")

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        embeddings: Float[Array, "B T D"] | None = None,
        cache: StateCache | None = None,
        train: bool = False,
    ) -> Output:
        """Logits of the next token at every position; ``positions`` are not read: the order of tokens is all there is.

        ``segments`` keep packed documents apart (0 is padding). ``embeddings`` replace the look-up of ``tokens``. With
        a ``cache`` the tokens continue each of its rows; there ``segments`` say which are real (1) and which are
        padding on a row's right (0), which the cache forgets. ``train`` changes nothing: there is no dropout.
        """
        config, kernels = self.config, fused.choose(self.config.compute, jax.default_backend())
        self.check_call(token_types)
        embed = Embed(config.vocab_size, config.d_model, config.init.embedding, config, name="embed")
        h = (embed(tokens) if embeddings is None else embeddings).astype(F32)
        prompt = None if cache is not None else prompt_of(dict(self.variables.get("params", {})))
        text = prepend(prompt, Text(h, jnp.zeros((1, tokens.shape[1]), jnp.int32), segments, None), None)
        door = Sites(jnp.int32(-1), self.taps, self.intervene)
        h = door("embed", constrain(text.h, "batch", None, None))
        packed, real = (text.segments, None) if cache is None or segments is None else (None, segments > 0)
        context = Context(segments=packed, real=real)
        block = Block(config, kernels, parent=None)
        stacks = layer_runs(self, block, config.num_layers, h, context)
        taps = tuple(name for name in self.taps if name != "embed")
        remat, unroll = config.compute.remat, kernels.unroll
        h, cache, kept = scan_layers(block, stacks, h, context, cache, taps, self.intervene, remat, unroll)
        h = h[:, h.shape[1] - tokens.shape[1] :]
        hidden = Norm(config, kernels, name="final_norm")(h).astype(config.compute.dtype)
        if config.head == "untied":
            Head(config, name="head")()
        logits = self.head(dict(self.variables["params"]), hidden)
        if cache is not None:
            cache = cache.advance(tokens.shape[1] if real is None else real.sum(1))
        return Output(logits=logits, hidden=hidden, cache=cache, taps={**door.kept, **kept})

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, params: Any = None, history: int = 0) -> StateCache:
        """A cache of ``batch`` rows, as large for any ``max_length``; ``history`` tokens can be taken back. It is
        empty, or has read the virtual tokens of ``params`` already."""
        config = self.config
        state = {
            "conv": jax.ShapeDtypeStruct((config.conv_width - 1, config.d_inner), jnp.dtype(config.compute.dtype)),
            "ssm": jax.ShapeDtypeStruct((config.state_size, config.d_inner), F32),
        }
        cache = StateCache.init(state, config.num_layers, batch, history)
        if params is None or (prompt := prompt_of(params)) is None:
            return cache
        rows = jnp.broadcast_to(prompt[None], (batch, *prompt.shape))
        tokens = jnp.zeros(rows.shape[:2], jnp.int32)
        out: Any = self.apply({"params": params}, tokens, embeddings=rows, cache=cache)
        return out.cache


# --- starting values --------------------------------------------------------------------------------------------------


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=F32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _log_counting(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """log(1), ..., log(Z) in every channel: A is S4D-Real's (2206.11893, section 3.3)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


# --- documents and caches ---------------------------------------------------------------------------------------------


def _same_document(segments: Int[Array, "B T"], back: int) -> Bool[Array, "B T"]:
    """Whether the token ``back`` places before belongs to the same document; there is none before the first."""
    return jnp.pad(segments[:, back:] == segments[:, :-back], [(0, 0), (back, 0)])


def _scan_and_trail(
    scan: Any, x: Array, delta: Array, B: Array, C: Array, start: Array, trail: int
) -> tuple[Float[Array, "B T I"], Float[Array, "P B Z I"]]:
    """Outputs, and the states after each of the last ``trail`` tokens, the last token's first."""
    outs, states, edge = [], [], x.shape[1] - trail + 1
    for begin, end in [(0, edge), *((t, t + 1) for t in range(edge, x.shape[1]))]:
        y, start = scan(x[:, begin:end], delta[:, begin:end], B=B[:, begin:end], C=C[:, begin:end], start=start)
        outs, states = [*outs, y], [start, *states]
    return jnp.concatenate(outs, axis=1), jnp.stack(states)


def _windows(
    inputs: Float[Array, "B S I"], real: Bool[Array, "B T"] | None, length: int, trail: int
) -> Float[Array, "P B W I"]:
    """What the convolution will see of its last inputs, after each of the last ``trail`` tokens, the last's first.

    ``inputs`` begin with those that it saw before the first of ``length`` tokens.
    """
    width = inputs.shape[1] - length
    if real is None:
        return jnp.stack([inputs[:, length - ago : length - ago + width] for ago in range(trail)])
    counts = real.sum(1)[None, :] - jnp.arange(trail)[:, None]  # what a row with fewer tokens gets here is never read
    cut = lambda row, count: jax.lax.dynamic_slice_in_dim(row, jnp.maximum(count, 0), width)  # noqa: E731
    return jax.vmap(jax.vmap(cut), (None, 0))(inputs, counts)
