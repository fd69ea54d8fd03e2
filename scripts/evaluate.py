"""Loss, perplexity and bits per byte of a trained model on a text; the accuracy of one that judges texts.

    python scripts/evaluate.py CHECKPOINT_OR_PRESET --split validation --corpus wikitext2

CHECKPOINT_OR_PRESET is what scripts/generate.py takes, or a run that classifies texts or words. A run folder is
measured on its own corpus by default, and by its own objective: a run that learned answers on answers.
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
        objective: "own" measures what the model was taught, "causal_lm" how it predicts each next token of any text.
        split: which part of it.
        sequence_length: tokens a window; at most the model's max_length. A run folder's own where not given.
        batch_size: windows at once.
        limit: batches to read; all of the split where not given.
        dtype: of computation; a checkpoint that is not a run of ours is read into it too.
    """

    checkpoint: Positional[str]
    corpus: str | None = None
    objective: Literal["own", "causal_lm"] = "own"
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

    from xylem.training.evaluate import evaluate, measured
    from xylem.training.restore import decodes, open_any

    as_text = parsed.objective == "causal_lm"
    model = open_any(parsed.checkpoint, parsed.dtype, decodes if as_text else measured)
    if as_text:
        model = model._replace(objective="causal_lm")
    chosen = {"corpus": parsed.corpus, "sequence_length": parsed.sequence_length}
    data = replace(model.data, **{name: value for name, value in chosen.items() if value is not None})
    if parsed.corpus is not None:
        data = replace(data, validation=None)  # the run's own held-out files are no part of another corpus
    figures = evaluate(model, data, parsed.split, parsed.batch_size, parsed.limit)
    line = "loss {loss:.4f} nats/token, perplexity {perplexity:.2f}"
    if "accuracy" in figures:
        line = "accuracy {accuracy:.4f}, loss {loss:.4f} nats/label ({labels:,.0f} labels)"
    elif "bits_per_byte" in figures:
        line += ", {bits_per_byte:.3f} bits per byte ({tokens:,.0f} tokens)"
    else:
        line += " ({tokens:,.0f} tokens)"
    print(f"{parsed.split}: {line.format(**figures)}")


if __name__ == "__main__":
    launch(main)
