"""The n-gram model as a language model: what ``generation`` calls, over the arrays that ``ngram.count`` made.

Its hidden state is the last ``order - 1`` tokens and its head the look-up of every token of the vocabulary, so only the
positions whose head is asked cost anything: right for generating. A whole text needs one look-up a position instead of
V: score it with ``ngram.score``. Move the tree to the device once: ``params = jax.tree.map(jnp.asarray, tree)``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from xylem.models.cache import TokenCache
from xylem.models.language_model import LanguageModel, Output
from xylem.models.ngram import contexts_at, log_distribution


class NGramLM(LanguageModel):
    """``config`` is an ``NGramConfig``; the parameters are ``ngram.count``'s tree, never ``init``'s."""

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        embeddings: Float[Array, "B T D"] | None = None,
        cache: TokenCache | None = None,
        train: bool = False,
    ) -> Output:
        """Logits are log-probabilities; ``positions`` and ``train`` change nothing.

        ``segments`` as everywhere: with a cache 1 for real tokens and 0 for padding on the right, without one the ids
        of packed documents, each of which is read as if alone.

        Raises:
            ValueError: ``embeddings`` are given: what is counted is ids.
        """
        self.check_call(token_types)
        if embeddings is not None:
            raise ValueError("embeddings: an n-gram model reads ids only")
        if cache is None:
            held, places = tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            begins = jnp.zeros_like(tokens, bool) if segments is None else segments != jnp.roll(segments, 1, axis=1)
        else:
            places = cache.lengths[:, None] + jnp.arange(tokens.shape[1])[None, :]
            cache = cache.update(tokens).advance(tokens.shape[1] if segments is None else (segments > 0).sum(axis=1))
            held, begins = cache.tokens, False
        hidden = contexts_at(held, begins | (held == self.config.end_of_text), places, self.config)
        logits = self.head(dict(self.variables["params"]), hidden)
        return Output(logits=logits, hidden=hidden, cache=cache, taps={})

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, params: Any = None) -> TokenCache:
        """An empty cache for ``max_length`` tokens a row."""
        return TokenCache.init(batch, max_length)

    @nn.nowrap
    def head(self, params: dict[str, Any], hidden: Int[Array, "*B C"]) -> Float[Array, "*B V"]:
        """Log-probabilities of every token after contexts; for ``mle`` those of ``ngram.distribution``."""
        return log_distribution(self.config, params, hidden)

    @nn.nowrap
    def head_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """All of them: the head is where the model looks anything up."""
        return params
