"""Text in, text out: a model bound to its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from xylem.data.tokenizers import Tokenizer
from xylem.generation.sampling import Sampling, generate
from xylem.models.transformer import CausalLM


@dataclass(frozen=True)
class Generator:
    """``Generator(module, params, tokenizer)(texts, sampling)`` continues texts; what prompting and servers call."""

    module: CausalLM
    params: Any
    tokenizer: Tokenizer

    def __call__(self, texts: Sequence[str], sampling: Sampling, key: PRNGKeyArray | None = None) -> list[str]:
        """The continuation of each text. The tokenizer's end of text always stops one; ``key`` defaults to seed 0."""
        end = self.tokenizer.end_of_text
        if end is not None and end not in sampling.stop:
            sampling = replace(sampling, stop=(*sampling.stop, end))
        prompts = [list(self.tokenizer.encode(text)) for text in texts]
        key = jax.random.key(0) if key is None else key
        return [self.tokenizer.decode(ids) for ids in generate(self.module, self.params, prompts, sampling, key).tokens]
