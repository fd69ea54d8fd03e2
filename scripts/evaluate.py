"""Loss, perplexity and bits per byte of a trained model on a text.

    python scripts/evaluate.py CHECKPOINT_OR_PRESET --split validation --corpus wikitext2

CHECKPOINT_OR_PRESET is what scripts/generate.py takes. A run folder is measured on its own corpus by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from xylem.launch import launch


@dataclass(frozen=True)
class Arguments:
    """What to measure.

    Attributes:
        checkpoint: the model.
        corpus: as --data.corpus of scripts/pretrain.py; a run folder's own where not given, else WikiText-2.
        split: which part of it.
        sequence_length: tokens a window; at most the model's max_length. A run folder's own where not given.
        batch_size: windows at once.
        limit: batches to read; all of the split where not given.
        dtype: of computation; a checkpoint that is not a run of ours is read into it too.
    """

    checkpoint: Positional[str]
    corpus: str | None = None
    split: Literal["train", "validation", "test"] = "validation"
    sequence_length: int | None = None
    batch_size: int = 8
    limit: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(arguments: list[str]) -> None:
    """Parse, call, print."""
    import tyro

    parsed = tyro.cli(Arguments, prog="evaluate.py", description=__doc__, args=arguments)

    from dataclasses import replace

    from xylem.training.evaluate import evaluate
    from xylem.training.restore import open_model

    model = open_model(parsed.checkpoint, parsed.dtype)
    chosen = {"corpus": parsed.corpus, "sequence_length": parsed.sequence_length}
    data = replace(model.data, **{name: value for name, value in chosen.items() if value is not None})
    if parsed.corpus is not None:
        data = replace(data, validation=None)  # the run's own held-out files are no part of another corpus
    figures = evaluate(model, data, parsed.split, parsed.batch_size, parsed.limit)
    print(
        "{split}: loss {loss:.4f} nats/token, perplexity {perplexity:.2f}, {bits_per_byte:.3f} bits per byte "
        "({tokens:,.0f} tokens)".format(split=parsed.split, **figures)
    )


if __name__ == "__main__":
    launch(main)
