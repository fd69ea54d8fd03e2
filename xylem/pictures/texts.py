"""What an objective makes of a text, word by word: what the model reads and what it shall say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import FancyBboxPatch

from xylem.configs.pretrain import RUNS
from xylem.data import corruption, denoising, examples, masking, pairs
from xylem.pictures import drawing

# From WikiText-2's training split, its articles on the Elephanta Caves and on Geopora sumneriana (Wikipedia, CC BY-SA
# 3.0): two sentences of each.
CAVES = (
    "The caves are hewn from solid basalt rock .",
    "All the caves were also originally painted in the past , but now only traces remain .",
)
FUNGUS = (
    "They have a short , tapered stalk .",
    "Fruitbodies are commonly found on soil where brush has recently been burned , sometimes in great numbers .",
)
SPECIAL = ("[MASK]", "[CLS]", "[SEP]", "<end>", "<start>")
SENTINELS = 6
WORDS = sorted({word for sentence in (*CAVES, *FUNGUS) for word in sentence.split()})
VOCABULARY = [*WORDS, *SPECIAL, *(f"<{number}>" for number in reversed(range(SENTINELS)))]  # the highest ids, as T5's
IDS = {word: number for number, word in enumerate(VOCABULARY)}
# Chosen so that two sentences show what else takes many: a random word, one that is kept, a random second sentence, a
# swapped pair, a run of three, a span of no tokens.
SEEDS = {"bert": 14, "roberta": 1, "albert": 15, "bart": 107, "t5": 0}
LOOKS = {  # fill and edge of a word
    "": ("#ffffff", "#cbd2d9"),
    "mask": ("#fbeccb", "#b7791f"),
    "random": ("#d6e4f0", "#2b6cb0"),
    "kept": ("#e3f1ea", "#2a7f62"),
    "special": ("#f3f4f6", "#7b8794"),
    "wanted": ("#e3f1ea", "#2a7f62"),
}
WIDEST = 7.2  # inches of words before a row goes on in the next line

Word = tuple[str, str]  # a word, and which of LOOKS it has


@dataclass(frozen=True)
class Texts:
    """Rows of words, each behind its name."""

    rows: tuple[tuple[str, tuple[Word, ...]], ...]

    def __str__(self) -> str:
        shown = [(name, [word + f" ({look})" * bool(look) for word, look in row]) for name, row in self.rows]
        return "\n".join(f"{name}: {' '.join(row)}" for name, row in shown)

    def draw(self, path: str | Path) -> None:
        """Write the picture as a PNG."""
        indent = max(drawing.text_width(name, drawing.TITLE, True) for name, _ in self.rows) + 0.3
        placed: list[tuple[float, float, float, Word]] = []
        names, y, widest = [], 0.22, 0.0
        for name, row in self.rows:
            names.append((name, y))
            x = indent
            for word in row:
                width = drawing.text_width(word[0], drawing.SMALL) + 0.1
                if x + width > indent + WIDEST:
                    x, y = indent, y + 0.25
                placed.append((x, y, width, word))
                x += width + 0.04
                widest = max(widest, x)
            y += 0.36
        figure, axis = drawing.canvas(widest + 0.08, y - 0.1)
        for name, at in names:
            axis.text(0.1, at, name, fontsize=drawing.TITLE, fontweight="bold", color=drawing.INK, va="center_baseline")
        for x, at, width, (word, look) in placed:
            fill, edge = LOOKS[look]
            shape = {"boxstyle": "round,pad=0,rounding_size=0.04", "fc": fill, "ec": edge, "lw": 0.8}
            axis.add_patch(FancyBboxPatch((x, at - 0.1), width, 0.2, **shape))
            middle = {"ha": "center", "va": "center_baseline"}
            axis.text(x + width / 2, at, word, fontsize=drawing.SMALL, color=drawing.INK, **middle)
        drawing.save(figure, path, str(self))


def ids(text: str) -> np.ndarray:
    """The numbers of words."""
    return np.array([IDS[word] for word in text.split()], np.int32)


def words(numbers: Sequence[int] | np.ndarray) -> tuple[Word, ...]:
    """Numbers as words; special ones look so."""
    named = [VOCABULARY[number] for number in numbers]
    return tuple((word, "mask" if word == "[MASK]" else "special" if _special(word) else "") for word in named)


def _special(word: str) -> bool:
    return word in SPECIAL or word not in WORDS


def _packed(sentences: Sequence[str], behind: int = 1) -> dict[str, np.ndarray]:
    """A window of packed text and the token behind it, as ``pipeline.Prepared`` has them; ``behind`` tokens end it."""
    tokens = np.append(ids(" ".join(sentences)), [IDS["<end>"]] * behind).astype(np.int32)
    return {"tokens": tokens, "segments": np.ones(len(tokens), np.int32)}


def _objective(run: str) -> Any:
    """The settings of a run's objective."""
    return RUNS[run]().objective


def _masked(record: Any, objective: Any, seed: int, epoch: int = 0) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    """What is read of a record, and the hidden words that are asked for."""
    special = [IDS[word] for word in VOCABULARY if _special(word)]
    own = {name: getattr(objective, name) for name in ("rate", "masked", "random", "max_ngram")}
    ids_of = {"special": special, "mask_id": IDS["[MASK]"], "vocab_size": len(VOCABULARY)}
    hide = partial(masking.mask_tokens, **ids_of, **own)
    made = examples.hidden_tokens(record, corruption.generator(seed, epoch, 0), hide=hide, most=9)
    read, chosen = list(words(made["tokens"][made["segments"] > 0])), made["weights"] > 0
    for place, label in zip(made["places"][chosen], made["labels"][chosen], strict=True):
        if read[place][1] != "mask":
            read[place] = (read[place][0], "kept" if made["tokens"][place] == label else "random")
    return tuple(read), tuple((VOCABULARY[label], "wanted") for label in made["labels"][chosen])


def _pair_rows(pair: pairs.Pair, judged: tuple[str, str], objective: Any, seed: int) -> Texts:
    record = pairs.records([pair], len(pair.tokens), IDS["[SEP]"])[0]
    read, asked = _masked(record, objective, seed)
    rows = {
        "the pair": words(pair.tokens),
        "token types": tuple((str(kind), "") for kind in pair.token_types),
        "it reads": read,
        "it says": (*asked, (judged[pair.label], "wanted")),
    }
    return Texts(tuple(rows.items()))


def bert(seed: int = SEEDS["bert"]) -> Texts:
    """Hidden tokens and the next sentence."""
    documents = [[ids(one) for one in document] for document in (CAVES, FUNGUS)]
    special = IDS["[CLS]"], IDS["[SEP]"]
    pair = pairs.next_sentence_pairs(documents, 0, pairs.chance(seed, 0, 0), 40, *special, short_probability=0.0)[0]
    return _pair_rows(pair, ("is next", "is not next"), _objective("bert"), seed)


def roberta(seed: int = SEEDS["roberta"]) -> Texts:
    """One window in three epochs."""
    record = _packed(CAVES)
    rows = [(f"epoch {epoch}", _masked(record, _objective("roberta"), seed, epoch)[0]) for epoch in range(3)]
    return Texts((("the text", words(record["tokens"][:-1])), *rows))


def albert(seed: int = SEEDS["albert"]) -> Texts:
    """Hidden runs of tokens and the order of two sentences."""
    document = [ids(one) for one in CAVES]
    special = IDS["[CLS]"], IDS["[SEP]"]
    pair = pairs.sentence_order_pairs(document, pairs.chance(seed, 0, 0), 40, *special, short_probability=0.0)[0]
    return _pair_rows(pair, ("in order", "swapped"), _objective("albert"), seed)


def bart(seed: int = SEEDS["bart"]) -> Texts:
    """Permuted sentences with spans missing."""
    record = _packed(CAVES, behind=2)  # the objective puts an end of its own in the last place of a window
    objective, ends = _objective("bart"), {"end": IDS["<end>"], "start": IDS["<start>"]}
    noise = denoising.bart(IDS["[MASK]"], [IDS["."]], objective.rate, objective.mean_span)
    return _pair_of_texts(record, examples.denoised(record, corruption.generator(seed, 0, 0), noise=noise, **ends))


def t5(seed: int = SEEDS["t5"]) -> Texts:
    """Missing spans."""
    record, objective = _packed((*CAVES, *FUNGUS)), _objective("t5")
    made = examples.corrupted_spans(
        record,
        corruption.generator(seed, 0, 0),
        vocab_size=len(VOCABULARY),
        end=IDS["<end>"],
        start=IDS["<start>"],
        noise_density=objective.noise_density,
        mean_span=objective.mean_span,
        sentinels=SENTINELS,
    )
    return _pair_of_texts(record, made)


def _pair_of_texts(record: Any, made: Any) -> Texts:
    real, asked = made["segments"] > 0, made["weights"] > 0
    rows = {
        "the text": words(record["tokens"][record["tokens"] != IDS["<end>"]]),
        "encoder reads": words(made["tokens"][real]),
        "decoder reads": words(made["decoder_tokens"][asked]),
        "decoder says": tuple((word, "wanted") for word, _ in words(made["labels"][asked])),
    }
    return Texts(tuple(rows.items()))
