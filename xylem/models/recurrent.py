"""Recurrent language models: an embedding, a stack of recurrent layers (``cells.py``), a head.

How layers are stored, scanned, tapped and intervened in is told in ``stack.py``. Every layer scans over time, and the
stack over layers. What such a model remembers has one size however much it has read: ``cache.StateCache``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.models import cells
from xylem.models.cache import StateCache
from xylem.models.fused import Choice, choose
from xylem.models.language_model import Head, LanguageModel, Output
from xylem.models.layers import Embed, parameter
from xylem.models.stack import Sites, layer_runs, scan_layers
from xylem.models.state_config import CELL_GATES, RecurrentConfig
from xylem.sharding import constrain


class Context(struct.PyTreeNode):
    """What every layer of one call shares."""

    segments: Int[Array, "B T"] | None
    rng: PRNGKeyArray | None
    train: bool = struct.field(pytree_node=False)


class Affine(nn.Module):
    """Owner of a kernel and a bias that something else multiplies by, step after step."""

    inputs: int
    outputs: int
    std: float
    stored: str
    bias: Any = 0.0  # its value at birth, a number or an array

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        kernel = parameter(self, "kernel", self.std, (self.inputs, self.outputs), self.stored)
        return {"kernel": kernel, "bias": parameter(self, "bias", None, (self.outputs,), self.stored, fill=self.bias)}


class CellWeights(nn.Module):
    """Owner of a cell's weights; ``stds`` are of the input's kernel and of the state's."""

    cell: str
    inputs: int
    width: int
    stds: tuple[float, float]
    stored: str
    forget_bias: float | None = None

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Any]]:
        gates, bias = CELL_GATES[self.cell] * self.width, 0.0
        if self.forget_bias is not None:
            bias = jnp.repeat(jnp.array([0.0, self.forget_bias, 0.0, 0.0]), self.width)
        return {
            "input": Affine(self.inputs, gates, self.stds[0], self.stored, bias, name="input")(),
            "recurrent": Affine(self.width, gates, self.stds[1], self.stored, name="recurrent")(),
        }


class RecurrentBlock(nn.Module):
    """One recurrent layer, dropout behind it."""

    config: RecurrentConfig
    kernels: Choice

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"], context: Context, cache: StateCache | None, layer: Any, site: Any):
        config, (batch, length, width) = self.config, h.shape
        stds, stored = (config.init.kernel, config.init.recurrent), config.compute.param_dtype
        weights = CellWeights(config.cell, width, width, stds, stored, config.forget_bias, name="cell")()
        if cache is None:
            state = cells.zero_state(config.cell, batch, width, config.compute.dtype)
        else:
            state = cache.read(layer)
        h, states = cells.layer(config.cell, weights, h, state, context.segments, self.kernels)
        if cache is not None:
            newest = min(length, cache.history + 1)
            padded = None if context.segments is None else (context.segments == 0).any(1)
            cache = cache.update(layer, jax.tree.map(lambda x: x[length - newest :][::-1], states), padded)
        h = nn.Dropout(config.dropout, deterministic=not context.train)(h)
        return site("block_out", constrain(h, "batch", None, None)), cache


class RecurrentLM(LanguageModel):
    """A recurrent language model. ``params`` hold ``embed``, the runs of ``layers`` and, when untied, ``head``."""

    config: RecurrentConfig

    SITES: ClassVar = ("embed", "block_out")

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
        """Logits of the next token at every position.

        ``segments`` (0 is padding) keep packed documents apart. ``embeddings`` replace the look-up of ``tokens``. With
        a ``cache`` the tokens continue each of its rows; there ``segments`` say which are real (1) and which are
        padding (0), which leaves no trace; where ids change within a row (1, 1, 2), the state starts anew as well.
        ``positions`` change nothing: order is what a recurrence sees. ``train=True`` applies dropout and needs
        ``rngs={"dropout": key}`` when the rate is above 0.
        """
        config, kernels = self.config, choose(self.config.compute, jax.default_backend())
        self.check_call(token_types)
        embed = Embed(config.vocab_size, config.d_model, config.init.embedding, config, name="embed")
        h = embed(tokens) if embeddings is None else embeddings.astype(config.compute.dtype)
        h = constrain(nn.Dropout(config.dropout, deterministic=not train)(h), "batch", None, None)
        door = Sites(jnp.int32(-1), self.taps, self.intervene)
        h = door("embed", h)
        rng = self.make_rng("dropout") if train and config.dropout > 0.0 else None
        context = Context(segments=segments, rng=rng, train=train)
        block = RecurrentBlock(config, kernels, parent=None)
        stacks = layer_runs(self, block, config.num_layers, h, context)
        layer_taps = tuple(name for name in self.taps if name != "embed")
        remat, unroll = config.compute.remat, kernels.unroll
        hidden, cache, kept = scan_layers(block, stacks, h, context, cache, layer_taps, self.intervene, remat, unroll)
        if config.head == "untied":
            Head(config, name="head")()
        logits = self.head(dict(self.variables["params"]), hidden)
        if cache is not None:
            cache = cache.advance(tokens.shape[1] if segments is None else (segments > 0).sum(1))
        return Output(logits=logits, hidden=hidden, cache=cache, taps={**door.kept, **kept})

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, params: Any = None, history: int = 0) -> StateCache:
        """The state before the first token in each of ``batch`` rows; ``rewind`` may go ``history`` tokens back.

        ``max_length`` is what other families need: a state takes the same room however many tokens it has read.
        """
        config = self.config
        shapes = cells.state_shapes(config.cell, config.d_model, config.compute.dtype)
        return StateCache.init(shapes, config.num_layers, batch, history)
