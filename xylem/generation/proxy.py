"""Proxy tuning (2401.08565): a large network answers as if tuned, moved by what tuning changed in a small one.

    logits = base + alpha (expert - antiexpert)         section 2.1; before temperature and top-p

The three share a vocabulary; where one has more rows at its end, those are cut off (the paper's code does, for experts
with added tokens). ``proxy`` makes one network of the three, which ``sampling.generate`` runs as any other;
``generate_black_box`` needs no more of the base than its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.generation.sampling import Completions, Sampling, draw
from xylem.models.language_model import LanguageModel, Output
from xylem.models.seq2seq import Seq2Seq

BlackBox = Callable[[list[list[int]]], np.ndarray]  # texts -> logits (B, V) of the token behind each
NAMES = ("base", "expert", "antiexpert")


def mix(
    base: Float[Array, "*B V"], expert: Float[Array, "*B E"], antiexpert: Float[Array, "*B A"], alpha: float = 1.0
) -> Float[Array, "*B U"]:
    """``base + alpha (expert - antiexpert)`` over the vocabulary that all three have: the smallest."""
    size = min(base.shape[-1], expert.shape[-1], antiexpert.shape[-1])
    return base[..., :size] + alpha * (expert[..., :size] - antiexpert[..., :size])


class Proxy(LanguageModel):
    """Decoders side by side, whose logits are mixed; ``params`` has their trees under ``NAMES``, a cache is a tuple.

    ``hidden`` is theirs, one behind the other. Without a ``base`` the logits are what a black box's are moved by.
    """

    base: LanguageModel | None = None
    expert: LanguageModel | None = None
    antiexpert: LanguageModel | None = None
    alpha: float = 1.0

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], *, cache: Any = None, **given: Any) -> Output:
        """What each reads is the same; ``given`` goes to all."""
        caches = [None] * len(self._members()) if cache is None else cache
        outs: list[Any] = [
            module(tokens, cache=own, **given) for module, own in zip(self._members().values(), caches, strict=True)
        ]
        hidden = jnp.concatenate([out.hidden for out in outs], axis=-1)
        logits = self.head(dict(self.variables["params"]), hidden)
        return Output(
            logits=logits, hidden=hidden, cache=None if cache is None else tuple(o.cache for o in outs), taps={}
        )

    @nn.nowrap
    def head(self, params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        members = self._members()
        ends = np.cumsum([module.config.d_model for module in members.values()])[:-1]
        states = jnp.split(hidden, ends, axis=-1)
        own = [module.head(params[name], h) for (name, module), h in zip(members.items(), states, strict=True)]
        return mix(jnp.zeros_like(own[0]) if self.base is None else own[0], own[-2], own[-1], self.alpha)

    @nn.nowrap
    def head_params(self, params: dict[str, Any]) -> dict[str, Any]:
        return {name: module.head_params(params[name]) for name, module in self._members().items()}

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, params: Any = None) -> tuple[Any, ...]:
        """A cache of each."""
        held = {} if params is None else params
        made = self._members().items()
        return tuple(module.init_cache(batch, max_length, held.get(name)) for name, module in made)  # type: ignore[attr-defined]

    @nn.nowrap
    def _members(self) -> dict[str, LanguageModel]:
        return {name: module for name in NAMES if (module := getattr(self, name)) is not None}


def proxy(base: LanguageModel | None, expert: LanguageModel, antiexpert: LanguageModel, alpha: float = 1.0) -> Proxy:
    """The three as one network, with parameters ``{"base": ..., "expert": ..., "antiexpert": ...}``.

    Raises:
        ConfigError: an encoder-decoder among them.
    """
    members = [module for module in (base, expert, antiexpert) if module is not None]
    if any(isinstance(module, Seq2Seq) for module in members):
        raise ConfigError("module", "an encoder-decoder", "proxy tuning mixes decoders")
    least = {name: min(getattr(m.config, name) for m in members) for name in ("vocab_size", "max_length")}
    # Copies: flax takes one module in two places for one module.
    own = [None if module is None else module.clone() for module in (base, expert, antiexpert)]
    return Proxy(replace(members[0].config, **least), base=own[0], expert=own[1], antiexpert=own[2], alpha=alpha)


@partial(jax.jit, static_argnames="module")
def _read(
    module: Proxy, params: Any, tokens: Int[Array, "B T"], real: Int[Array, "B T"], cache: Any
) -> tuple[Float[Array, "B V"], Any]:
    """What the logits behind the last real token are moved by."""
    out: Any = module.apply({"params": params}, tokens, segments=real, cache=cache)
    return module.head(params, out.hidden[jnp.arange(tokens.shape[0]), real.sum(1) - 1]), out.cache


def generate_black_box(
    base: BlackBox,
    expert: LanguageModel,
    antiexpert: LanguageModel,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    key: PRNGKeyArray,
    alpha: float = 1.0,
) -> Completions:
    """As ``sampling.generate`` of a ``proxy``, of whose base there are logits alone: ``base(texts)``, one call a token.

    ``params`` are the expert's and the anti-expert's.

    Raises:
        ConfigError: an empty prompt, or more tokens than the experts' ``max_length``.
    """
    pair, lengths = proxy(None, expert, antiexpert, alpha), np.array([len(prompt) for prompt in prompts])
    if not len(prompts) or lengths.min() == 0:
        raise ConfigError("prompts", list(prompts), "there must be at least one, and each needs at least one token")
    capacity = int(lengths.max()) + sampling.max_new_tokens
    if capacity > pair.config.max_length:
        raise ConfigError("max_new_tokens", capacity, f"the experts' max_length is {pair.config.max_length}")
    texts, cache = [list(prompt) for prompt in prompts], pair.init_cache(len(prompts), capacity, params)
    real = (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int32)
    tokens = np.zeros_like(real)
    tokens[real > 0] = np.concatenate(texts)
    stopped = [False] * len(texts)
    for step in range(sampling.max_new_tokens):
        moved, cache = _read(pair, params, jnp.asarray(tokens), jnp.asarray(real), cache)
        logits = jnp.asarray(base(texts), jnp.float32)
        mixed = mix(logits, moved, jnp.zeros_like(moved))
        drawn = np.asarray(draw(mixed, sampling, jax.random.fold_in(key, step)))
        stopped = [ended or token in sampling.stop for ended, token in zip(stopped, drawn.tolist(), strict=True)]
        if all(stopped):
            break
        texts = [[*text, int(token)] for text, token in zip(texts, drawn, strict=True)]
        tokens, real = drawn[:, None], np.ones((len(texts), 1), np.int32)
    return _without_stops(texts, lengths, stopped, sampling)


def _without_stops(texts: list[list[int]], lengths: np.ndarray, stopped: list[bool], sampling: Sampling) -> Completions:
    """Each row's own tokens up to its stop token; rows that ended early went on being written."""
    written = [text[length:] for text, length in zip(texts, lengths, strict=True)]
    ends = [next((i for i, token in enumerate(row) if token in sampling.stop), len(row)) for row in written]
    return Completions([np.array(row[:end], np.int32) for row, end in zip(written, ends, strict=True)], stopped)
