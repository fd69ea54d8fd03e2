"""Judge texts with a model that was fine-tuned to: their labels, or those of their words.

    python scripts/classify.py RUN --text "A fine day." "A bad one."
    python scripts/classify.py RUN --file TEXTS

RUN is a folder that scripts/finetune.py made with --objective.name classification or token_classification, its
adapter/, or a Hugging Face folder that judges. Without --text, a text is a line of the file, or of what comes in by
the standard input; of a .jsonl file, what stands under "text" (and "text_pair") or "words". Printed is a line a text:
label, probability, text; of a model that judges words, a line a word and an empty one behind each text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from xylem.launch import launch


@dataclass(frozen=True)
class Arguments:
    """What to judge.

    Attributes:
        run: the model.
        text: one text or several; words are parted by spaces.
        file: texts, one a line; "-" is the standard input.
        dtype: of computation.
    """

    run: Positional[str]
    text: tuple[str, ...] = ()
    file: str = "-"
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(arguments: list[str]) -> None:
    """Parse, call, print."""
    import tyro

    parsed = tyro.cli(Arguments, prog="classify.py", description=__doc__, args=arguments)

    from xylem.training.judging import judge_texts, judge_words
    from xylem.training.restore import judges, open_any

    model = open_any(parsed.run, parsed.dtype, judges)
    texts = [(text,) for text in parsed.text] or list(read(parsed.file))
    if model.objective == "classification":
        for text, (label, probability) in zip(texts, judge_texts(model, texts), strict=True):
            print(f"{label}\t{probability:.4f}\t{' | '.join(text)}")
        return
    parted = [words for text in texts if (words := [word for part in text for word in part.split()])]
    for words, found in zip(parted, judge_words(model, parted), strict=True):
        for word, one in zip(words, found, strict=True):
            print(f"{word}\t-\t-" if one is None else f"{word}\t{one.label}\t{one.probability:.4f}")
        print()


def read(name: str) -> Iterator[tuple[str, ...]]:
    """The texts of a file, each as its parts."""
    import sys
    from pathlib import Path

    from xylem.data import corpora
    from xylem.errors import ConfigError

    if name == "-":
        yield from ((line.strip(),) for line in sys.stdin if line.strip())
        return
    path = Path(name)
    if not path.is_file():
        raise ConfigError("file", name, "a file of texts, one a line, or - for the standard input")
    if path.suffix != ".jsonl":
        yield from ((line.strip(),) for line in path.read_text("utf-8").splitlines() if line.strip())
        return
    for where, record in corpora.json_lines(path, "file"):
        parts: Any = [record.get("text"), record.get("text_pair", "")] if "text" in record else record.get("words")
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ConfigError("file", where, 'each line is {"text": ...} or {"words": [...]}')
        yield tuple(part for part in parts if part)


if __name__ == "__main__":
    launch(main)
