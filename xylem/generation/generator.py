"""Text in, text out: a model bound to its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from xylem.data.tokenizers import Tokenizer
from xylem.generation.sampling import Sampling, generate
from xylem.models.decoding import ready
from xylem.models.language_model import LanguageModel
from xylem.models.seq2seq import Seq2Seq


@dataclass(frozen=True)
class Generator:
    """``Generator(module, params, tokenizer)(texts, sampling)`` continues texts; what prompting and servers call.

    An encoder-decoder reads each text with the end-of-text token behind it, as it was trained, and writes its own.
    """

    module: LanguageModel
    params: Any
    tokenizer: Tokenizer

    @cached_property
    def _ready(self) -> Any:
        return ready(self.module.config, self.params)

    def __call__(self, texts: Sequence[str], sampling: Sampling, key: PRNGKeyArray | None = None) -> list[str]:
        """The continuation of each text. The tokenizer's stop tokens always end one; ``key`` defaults to seed 0."""
        return self.continue_ids([self.tokenizer.prompt(text) for text in texts], sampling, key)

    def chat(self, questions: Sequence[str], sampling: Sampling, key: PRNGKeyArray | None = None) -> list[str]:
        """The answer to each question, asked as one user message through the tokenizer's chat template."""
        rendered = [self.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in questions]
        ids = [self.tokenizer.encode(text, parse_special=True).tolist() for text in rendered]
        return self.continue_ids(ids, sampling, key)

    def continue_ids(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, key: PRNGKeyArray | None = None
    ) -> list[str]:
        """The continuation of each prompt that is given as ids."""
        stop = tuple(dict.fromkeys((*sampling.stop, *self.tokenizer.stop)))
        most = min(sampling.vocab_size or self.tokenizer.vocab_size, self.tokenizer.vocab_size)
        sampling = replace(sampling, stop=stop, vocab_size=most)
        key, answers = jax.random.key(0) if key is None else key, isinstance(self.module, Seq2Seq)
        if answers:
            prompts = [[*prompt, self.tokenizer.end_of_text] for prompt in prompts]
        completions = generate(self.module, self._ready, prompts, sampling, key)
        if answers:
            return [self.tokenizer.decode(tokens) for tokens in completions.tokens]
        return [self.tokenizer.decode_after(*pair) for pair in zip(prompts, completions.tokens, strict=True)]
