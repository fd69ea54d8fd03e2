"""Two pictures in numbers: how Kneser-Ney shares probability out among orders, and how fast rotary positions turn."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from xylem.models import PRESETS, ngram
from xylem.models.positions import rope_frequencies
from xylem.pictures import drawing

SHADES = ("#2a7f62", "#86b8a5", "#2b6cb0", "#cbd2d9")


@dataclass(frozen=True)
class Shares:
    """What each order adds to the probability of words after a context.

    Attributes:
        shares: of each word, from the highest order to the uniform end.
    """

    context: str
    names: tuple[str, ...]
    shares: tuple[tuple[str, tuple[float, ...]], ...]

    def __str__(self) -> str:
        rows = [f"{word} " + " ".join(f"{share:.4f}" for share in parts) for word, parts in self.shares]
        return "\n".join([self.context, " ".join(self.names), *rows])

    def draw(self, path: str | Path) -> None:
        """Write the picture as a PNG."""
        figure, axis = _axes(8.0, 0.26 * len(self.shares) + 1.0, f"probability after “{self.context} …”")
        left = np.zeros(len(self.shares))
        for number, (name, colour) in enumerate(zip(self.names, SHADES, strict=True)):
            parts = np.array([shares[number] for _, shares in self.shares])
            axis.barh(range(len(parts)), parts, left=left, color=colour, height=0.7, label=name)
            left += parts
        for place, total in enumerate(left):
            axis.text(total, place, f" {total:.3f}", va="center_baseline", fontsize=drawing.SMALL, color=drawing.INK)
        axis.set_yticks(range(len(left)), [word for word, _ in self.shares], fontsize=drawing.TITLE, color=drawing.INK)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.12 * left.max())
        axis.legend(frameon=False, fontsize=drawing.SMALL, labelcolor=drawing.INK, loc="lower right")
        drawing.save(figure, path, str(self))


@dataclass(frozen=True)
class Curves:
    """Wavelengths of the rotated pairs of a head, in tokens, by the name of a model."""

    curves: tuple[tuple[str, tuple[float, ...]], ...]

    def __str__(self) -> str:
        return "\n".join(f"{name} " + " ".join(f"{one:.3g}" for one in values) for name, values in self.curves)

    def draw(self, path: str | Path) -> None:
        """Write the picture as a PNG."""
        figure, axis = _axes(8.0, 3.0, "tokens until a pair has turned once, by pair")
        colours = (drawing.MUTED, drawing.TRAIN, drawing.NOTE)
        styles = ("-", "-", "--")
        for (name, values), colour, style in zip(self.curves, colours, styles, strict=True):
            axis.plot(range(len(values)), values, color=colour, lw=1.8, ls=style, label=name)
        axis.set_yscale("log")
        axis.set_xlim(0, max(len(values) for _, values in self.curves) - 1)
        axis.grid(axis="y", color=drawing.GRID, lw=0.8)
        axis.legend(frameon=False, fontsize=drawing.SMALL, labelcolor=drawing.INK, loc="upper left")
        drawing.save(figure, path, str(self))


def kneser_ney(text: Path, context: tuple[str, str] = ("of", "the"), order: int = 3, shown: int = 8) -> Shares:
    """The likeliest words after a context in a text, and one that never followed it, by an interpolated Kneser-Ney
    model of the text's words."""
    stream = re.findall(r"[a-z]+", text.read_text().lower())
    known = sorted(set(stream))
    ids = {word: number for number, word in enumerate(known)}
    config = ngram.NGramConfig(vocab_size=len(known) + 1, end_of_text=len(known), order=order)
    tree = ngram.count([np.array([ids[word] for word in stream])], config)
    before = np.array([ids[word] for word in context])
    parts = contributions(config, tree, before)
    ranked = np.argsort(-parts.sum(0), kind="stable")
    unseen = next(word for word in ranked if parts[0, word] == 0)
    wanted = [*[word for word in ranked if parts[0, word] > 0][:shown], unseen]
    names = tuple(f"seen after “{' '.join(context[-k:])}”" for k in range(order - 1, 0, -1))
    rows = [([*known, "<end>"][word], tuple(parts[:, word].round(6).tolist())) for word in wanted]
    return Shares(" ".join(context), (*names, "seen after many words", "any word"), tuple(rows))


def contributions(config: ngram.NGramConfig, tree: ngram.Tree, context: np.ndarray) -> np.ndarray:
    """What each order adds to the probability of every token after a context that was seen: the highest order first,
    the equal shares last. The columns are sums of ``ngram.distribution``."""
    parts, rest, row = [], 1.0, 0
    rows = [0]
    for m in range(1, config.order):
        row = _place(tree, f"contexts/{m}", row, int(context[-m]))
        rows.append(row)
    for k in range(config.order, 0, -1):
        held = slice(*tree[f"grams/{k}/starts"][rows[k - 1] : rows[k - 1] + 2])
        total, discount = tree[f"grams/{k}/totals"][rows[k - 1]], tree["discounts"][k - 1]
        own = np.zeros(config.vocab_size)
        own[tree[f"grams/{k}/tokens"][held]] = np.maximum(tree[f"grams/{k}/counts"][held] - discount, 0) / total
        parts.append(rest * own)
        rest *= discount * (held.stop - held.start) / total
    return np.stack([*parts, np.full(config.vocab_size, rest / config.vocab_size)])


def _place(tree: ngram.Tree, name: str, row: int, token: int) -> int:
    start, stop = tree[f"{name}/starts"][row : row + 2]
    return int(start + np.searchsorted(tree[f"{name}/tokens"][start:stop], token))


def wavelengths() -> Curves:
    """How far apart two tokens are whose rotary angles meet again, in LLaMA 1, 3 and 3.1."""
    curves = []
    for name in ("llama_7b", "llama3_8b", "llama3_1_8b"):
        config: Any = PRESETS[name]()
        where = config.positions
        rates = np.asarray(rope_frequencies(config.head_dim, where.rope_theta, where.rope_scaling), np.float64)
        curves.append((name, tuple((2 * math.pi / rates).tolist())))
    return Curves(tuple(curves))


def _axes(width: float, height: float, heading: str) -> tuple[Any, Any]:
    figure = Figure(figsize=(width, height), dpi=drawing.DPI, facecolor="white", layout="constrained")
    axis = figure.subplots()
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(drawing.INK)
    axis.tick_params(colors=drawing.INK, labelcolor=drawing.INK, labelsize=drawing.SMALL, length=3)
    axis.set_axisbelow(True)
    axis.set_title(heading, loc="left", color=drawing.INK, fontsize=drawing.TITLE)
    return figure, axis
