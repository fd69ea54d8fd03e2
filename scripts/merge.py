"""Write a model as a folder that Hugging Face's libraries open, what was grafted on it merged into its weights.

    python scripts/merge.py RUN --out FOLDER

RUN is a folder of scripts/finetune.py or its adapter/, or any other model that scripts/evaluate.py opens. Printed is
what merging costs: the largest change of a logit over the largest logit, on random tokens. A base of few bits is
decoded for it and not rounded again. Adapters, prompts, prefixes and states to begin with are no part of a weight: a
model that has learned one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from xylem.launch import launch


@dataclass(frozen=True)
class Arguments:
    """What to merge, and where to.

    Attributes:
        run: the model.
        out: a new or an empty folder.
        tokens: so many random ones are read for the measurement, or as many as the model can.
        seed: of these tokens.
    """

    run: Positional[str]
    out: str
    tokens: int = 128
    seed: int = 0


def main(arguments: list[str]) -> None:
    """Parse, merge, measure, write."""
    import tyro

    parsed = tyro.cli(Arguments, prog="merge.py", description=__doc__, args=arguments)

    from pathlib import Path

    from xylem.errors import ConfigError

    if parsed.tokens < 2:
        raise ConfigError("tokens", parsed.tokens, "it must be at least 2")

    import jax
    import jax.numpy as jnp
    import numpy as np

    from xylem.files import check_new, whole_folder
    from xylem.models import heads, hub
    from xylem.models.config import Seq2SeqConfig
    from xylem.peft.merging import merge, merge_error
    from xylem.peft.tree import unsplit
    from xylem.training.restore import any_task, open_any

    out = Path(parsed.out)
    check_new("out", out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", parsed.out, f"a folder that can be made: {error}") from error
    model = open_any(parsed.run, check=any_task)
    config = model.module.config
    hub.describe(config)  # refuses what Hugging Face has no word for
    rng, length = np.random.default_rng(parsed.seed), min(parsed.tokens, config.max_length)
    batch: dict[str, Any] = {"tokens": jnp.asarray(rng.integers(0, model.tokenizer.vocab_size, (1, length)), jnp.int32)}
    if isinstance(config, Seq2SeqConfig):
        batch["decoder_tokens"] = batch["tokens"][:, ::-1]

    @jax.jit
    def logits(params):
        if model.labels:
            return heads.judged(model.module, params, batch | {"segments": jnp.ones_like(batch["tokens"])})
        out: Any = model.module.apply({"params": params}, **batch)
        return out.logits

    try:
        moved = merge_error(logits, model.params)
    except ValueError as error:
        raise ConfigError("run", parsed.run, str(error)) from error
    with whole_folder(out) as draft:
        hub.save(draft, config, unsplit(merge(model.params)), labels=model.labels)
        model.tokenizer.save(draft)
    print(f"{out}: merging moves the logits by {moved:.2g} of the largest")


if __name__ == "__main__":
    launch(main)
