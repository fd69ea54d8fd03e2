"""A language model that reads its last few tokens anew for every next one: LSTM layers, and an average over time.

The tokens of a window, 0 where there are none before them, pass an embedding and LSTM layers; what every stage made of
every token, side by side, is averaged with weights that one vector scores (Felbo et al. 1708.00524, figure 1, as
textgenrnn has it). Its state cannot be carried on: with the next token the window begins one later. So it remembers
tokens (``cache.TokenCache``), and costs a window for each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from xylem.models import cells
from xylem.models.cache import TokenCache
from xylem.models.language_model import LanguageModel, Output
from xylem.models.layers import Embed, add_bias, einsum, parameter
from xylem.models.recurrent import Affine, CellWeights
from xylem.models.state_config import WindowedConfig

EPSILON = 1e-7  # keras.backend.epsilon(), which the sum of the weights is divided with


def windows(
    tokens: Int[Array, "B S"], first: Int[Array, "B"], length: int, window: int, segments: Int[Array, "B S"] | None
) -> Int[Array, "B T W"]:
    """The ``window`` tokens up to each of ``length`` places from ``first`` on, 0 where a row or a document begins."""
    behind = jnp.arange(window)[::-1]
    places = first[:, None, None] + jnp.arange(length)[None, :, None] - behind[None, None, :]
    at = lambda rows: jnp.take_along_axis(rows[:, None, :], jnp.maximum(places, 0), axis=2, mode="clip")  # noqa: E731
    inside = places >= 0
    if segments is not None:
        inside &= at(segments) == at(segments)[:, :, -1:]
    return jnp.where(inside, at(tokens), 0)


def read(layers: list[cells.Weights], scores: Any, x: Float[Array, "B W I"]) -> Float[Array, "B D"]:
    """What is made of one embedded window a row: every stage's states side by side, averaged over time."""
    stages = [x]
    for weights in layers:
        state = cells.zero_state("lstm", x.shape[0], weights["recurrent"]["kernel"].shape[0], str(x.dtype))
        stages.append(cells.layer("lstm", weights, stages[-1], state)[0])
    states = jnp.concatenate(stages, axis=-1)
    logits = einsum("...i,io->...o", states, scores).astype(jnp.float32)
    shares = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True) + EPSILON
    return (states * shares.astype(states.dtype)).sum(axis=1)


class Scores(nn.Module):
    """Owner of the vector that weighs the states."""

    width: int
    stored: str

    @nn.compact
    def __call__(self) -> Any:
        return parameter(self, "kernel", self.width**-0.5, (self.width, 1), self.stored)


class WindowedLM(LanguageModel):
    """A model over a window. ``params`` hold ``embed``, ``lstm_0``, ``lstm_1``, ..., ``attention``, ``head``."""

    config: WindowedConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        embeddings: Float[Array, "B T I"] | None = None,
        cache: TokenCache | None = None,
        train: bool = False,
    ) -> Output:
        """Logits of the next token at every position.

        ``segments`` (0 is padding) keep packed documents apart. With a ``cache`` the tokens continue each of its rows;
        there ``segments`` say which are real (1) and which are padding (0), which leaves no trace. ``positions`` and
        ``train`` change nothing: there is no dropout. ``embeddings`` cannot be given: windows are looked up by id.
        """
        config = self.config
        self.check_call(token_types)
        if embeddings is not None:
            raise ValueError(f"embeddings: the {config.family} family remembers tokens, and looks them up itself")
        batch, length = tokens.shape
        if cache is None:
            seen = windows(tokens, jnp.zeros(batch, jnp.int32), length, config.window, segments)
        else:
            written = cache.update(tokens)
            seen = windows(written.tokens, cache.lengths, length, config.window, None)
            cache = written.advance(length if segments is None else (segments > 0).sum(1))
        embed = Embed(config.vocab_size, config.d_embedding, 0.03, config, name="embed")  # as uniform(-0.05, 0.05)
        layers, scores = self._weights()
        # One place of all rows after another: a window of every place at once would take the memory of all of them.
        hidden = jax.lax.map(partial(read, layers, scores), embed(seen).swapaxes(0, 1)).swapaxes(0, 1)
        self._head()
        return Output(logits=self.head(dict(self.variables["params"]), hidden), hidden=hidden, cache=cache, taps={})

    @nn.nowrap
    def _weights(self) -> tuple[list[cells.Weights], Any]:
        """Of the layers and of the attention; fresh kernels have the spread of Keras's."""
        config, layers = self.config, []
        width, stored = config.d_layer, config.compute.param_dtype
        for number in range(config.num_layers):
            inputs = width if number else config.d_embedding
            stds = (2 / (inputs + width)) ** 0.5, width**-0.5
            layers.append(CellWeights("lstm", inputs, width, stds, stored, 1.0, name=f"lstm_{number}")())
        return layers, Scores(config.d_model, stored, name="attention")()

    @nn.nowrap
    def _head(self) -> None:
        config = self.config
        std = (2 / (config.d_model + config.vocab_size)) ** 0.5
        Affine(config.d_model, config.vocab_size, std, config.compute.param_dtype, name="head")()

    @nn.nowrap
    def head(self, params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of averaged states; this family's output matrix has a bias."""
        return add_bias(super().head(params, hidden), params["head"]["bias"])

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, params: Any = None) -> TokenCache:
        """An empty cache for ``max_length`` tokens a row."""
        return TokenCache.init(batch, max_length)
