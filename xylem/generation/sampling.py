"""From logits to tokens: one jitted loop over a cache, prompts of unequal length in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.cache import grown
from xylem.models.decoding import ready, ready_cache, rooms_for
from xylem.models.language_model import LanguageModel
from xylem.models.seq2seq import Seq2Seq
from xylem.models.virtual import prefix_length, prompt_of, virtual_length

BUCKET = 32  # prompt lengths and budgets are rounded up to this, so that few shapes are ever compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: at most so many tokens a prompt.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw among the k likeliest (ties with the k-th included); None for all.
        top_p: draw among the fewest likeliest whose probabilities reach p (1904.09751, section 3.1); None for all.
        stop: token ids that end a completion; they are not part of it.
        vocab_size: only ids below this are drawn, for a table may have more rows than the tokenizer has tokens; None
            for all.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", self.max_new_tokens, "it must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError("temperature", self.temperature, "it must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", self.top_k, "it must be at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "it must lie in (0, 1], or be None")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ConfigError("vocab_size", self.vocab_size, "it must be at least 1, or None")


@dataclass(frozen=True)
class Completions:
    """What was generated for each prompt, without the prompt (or what starts a target) and without the stop token.

    Attributes:
        tokens: one array of ids a prompt.
        stopped: whether a stop token ended it, rather than the budget.
    """

    tokens: list[np.ndarray]
    stopped: list[bool]


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, then top-k, then top-p; tokens that cannot be drawn get minus infinity."""
    logits = _tokens_alone(logits, sampling)
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        order = jnp.argsort(logits, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
        drop = (below <= 1.0 - sampling.top_p).at[:, -1].set(False)  # the likeliest always stays
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.where(jnp.zeros_like(drop).at[rows, order].set(drop), -jnp.inf, logits)
    return logits


def draw(logits: Float[Array, "B V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, "B"]:
    """One token a row."""
    if sampling.temperature == 0:
        return likeliest(_tokens_alone(logits, sampling))
    return jax.random.categorical(key, filter_logits(logits, sampling), axis=-1).astype(jnp.int32)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """``jnp.argmax`` over the vocabulary, in two passes: XLA:CPU vectorizes each, and compares one by one in its own.

    Down the columns of (V, B), for so few rows of logits lie in memory. Of 32 rows of 32,000 it takes 0.7 ms, and 3.0
    by ``jnp.argmax``. The last token where a logit is not a number.
    """
    logits, last = logits.T, logits.shape[-1] - 1
    peak = jax.lax.optimization_barrier(jnp.max(logits, axis=0, keepdims=True))
    return jnp.min(jnp.where(logits == peak, jnp.arange(last + 1)[:, None], last), axis=0)


def _tokens_alone(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits with minus infinity for rows of the table that are no token."""
    if sampling.vocab_size is None or sampling.vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1])[None] < sampling.vocab_size, logits, -jnp.inf)


@partial(jax.jit, static_argnames=("module", "sampling", "capacity"))
def _loop(
    module: LanguageModel,
    params: Any,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    limit: Int[Array, ""] | int,
    key: PRNGKeyArray,
    *,
    sampling: Sampling,
    capacity: int,
) -> tuple[Int[Array, "B U"], Int[Array, "B"]]:
    """Read the prompts, then write until every row has stopped; returns tokens and how many of each row count.

    ``limit`` tokens are written at most; there is room for ``sampling.max_new_tokens``, which is rounded up.
    """
    batch = prompts.shape[0]
    last, cache = _read(module, params, prompts, lengths)
    stop = jnp.array(sampling.stop, jnp.int32)

    def unfinished(end, carry):
        step, stopped = carry[0], carry[4]
        return (step < jnp.minimum(limit, end)) & ~stopped.all()

    def record(step, hidden, cache, tokens, stopped, counts):
        """The next token drawn from the final state before it, and written down."""
        token = draw(module.head(params, hidden), sampling, jax.random.fold_in(key, step))
        stopped = stopped | (token[:, None] == stop[None, :]).any(-1)
        return step + 1, token, cache, tokens.at[:, step].set(token), stopped, counts + ~stopped

    def write(carry):
        step, token, cache, *rest = carry
        out: Any = module.apply({"params": params}, token[:, None], cache=cache)
        return record(step, out.hidden[:, 0], out.cache, *rest)

    blank = jnp.zeros((batch, sampling.max_new_tokens), jnp.int32)
    carry: Any = record(jnp.int32(0), last, cache, blank, jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32))
    read = 1 if isinstance(module, Seq2Seq) else prompts.shape[1]
    rooms = rooms_for(module.config, cache, capacity - read)
    ends = [1 + end for end in accumulate(rooms)]  # the last token is read by nobody
    for room, end in zip(rooms, [*ends[:-1], sampling.max_new_tokens], strict=True):
        step, token, cache, *rest = carry
        cache = ready_cache(module.config, grown(cache, room))
        carry = jax.lax.while_loop(partial(unfinished, end), write, (step, token, cache, *rest))
    return carry[3], carry[5]


def _read(
    module: LanguageModel, params: Any, prompts: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Array, Any]:
    """The state that the first new token is drawn from, and a full cache; an encoder-decoder starts an empty target.

    What is read attends to all that its cache has room for: the room for what is written comes afterwards.
    """
    batch, length = prompts.shape
    real = (jnp.arange(length)[None, :] < lengths[:, None]).astype(jnp.int32)
    if isinstance(module, Seq2Seq):
        cache = module.start(params, prompts, 1, real)
        prompts, lengths, real = jnp.full((batch, 1), module.config.decoder_start), jnp.ones_like(lengths), None
    else:
        cache = module.init_cache(batch, length, params)
    out: Any = module.apply({"params": params}, prompts, segments=real, cache=cache)
    return out.hidden[jnp.arange(batch), lengths - 1], out.cache  # the head sees one position a row, not the prompt


def virtual_tokens(module: LanguageModel, params: Any) -> tuple[int, ...]:
    """Virtual tokens in front of what is read and of what is written, one number where these are one text."""
    if isinstance(module, Seq2Seq):
        return virtual_length(params["encoder"], prompt_of(params)), prefix_length(params["decoder"])
    return (virtual_length(params, prompt_of(params)),)


def generate(
    module: LanguageModel, params: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, key: PRNGKeyArray
) -> Completions:
    """Continue each prompt (ids, at least one) until a stop token or ``sampling.max_new_tokens``.

    An encoder-decoder reads the prompt as its source and writes the target behind ``decoder_start``.

    A row's tokens do not depend on how its neighbours' prompts are padded; greedy rows not on their neighbours at all.

    Raises:
        ConfigError: an empty prompt, an id outside the vocabulary, or more tokens than the model's ``max_length``.
    """
    config = module.config
    reads = config.encoder if isinstance(module, Seq2Seq) else config
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(prompts) or lengths.min() == 0:
        raise ConfigError("prompts", list(prompts), "there must be at least one, and each needs at least one token")
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ConfigError("prompts", list(prompt), f"ids must lie in [0, {config.vocab_size})")
    read, written = int(lengths.max()), sampling.max_new_tokens
    # What the cache holds: the prompt and what is written; of a target, the id that starts it and what is written.
    start = 1 if isinstance(module, Seq2Seq) else read
    virtual = virtual_tokens(module, params)
    if start + written + virtual[-1] > config.max_length:
        what = "a target's start" if isinstance(module, Seq2Seq) else "prompt"
        what = f"{what}, {virtual[-1]} virtual tokens" if virtual[-1] else what
        allowed = f"{what} and new tokens together must fit the model's max_length = {config.max_length}"
        raise ConfigError("max_new_tokens", f"{start} + {written}", allowed)
    if read + virtual[0] > reads.max_length:
        with_virtual = f", {virtual[0]} of them virtual" if virtual[0] else ""
        raise ConfigError("prompts", f"{read} tokens", f"the encoder's max_length is {reads.max_length}{with_virtual}")
    up = lambda size, most=config.max_length - virtual[-1]: min(most, -(-size // BUCKET) * BUCKET)  # noqa: E731
    padded = np.zeros((len(prompts), up(read, reads.max_length - virtual[0])), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    rounded, capacity = replace(sampling, max_new_tokens=up(written)), up(start + written)
    params = ready(config, params)
    out = _loop(module, params, padded, lengths, written, key, sampling=rounded, capacity=capacity)
    tokens, counts = map(np.asarray, out)
    return Completions(
        tokens=[row[:count] for row, count in zip(tokens, counts, strict=True)],
        stopped=[bool(count < written) for count in counts],
    )
