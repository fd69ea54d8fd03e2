"""The loss curve of a run as a picture."""

import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xylem.files import write_whole

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN, VALID = "#2a7f62", "#d1495b"


def loss_curve(
    metrics_path: str | Path,
    png_path: str | Path,
    references: Mapping[str, float | int] | None = None,
    title: str = "",
) -> None:
    """Draw `metrics.jsonl` as a PNG: training and validation loss on the left, bits per byte on the right.

    Reads of each row `step`, `loss` (nats a token), and where present `tokens` (trained on so far; the axis is steps
    without it), `validation_loss` and `validation_bits_per_byte`. `references` are horizontal lines of the right panel
    in bits per byte, as {"xz": 2.5}; the panel is left out where there is nothing to show in it. The picture replaces
    `png_path` whole. A file without a row draws empty axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in Path(metrics_path).read_text().splitlines() if line.strip()]
    key = "tokens" if rows and all(row.get("tokens") is not None for row in rows) else "step"
    scale, unit = _unit(max((row[key] for row in rows), default=0), "tokens" if key == "tokens" else "steps")
    train = _series(rows, key, "loss", scale)
    valid = _series(rows, key, "validation_loss", scale)
    bits = _series(rows, key, "validation_bits_per_byte", scale)

    panels = 2 if bits[0] else 1
    figure = Figure(figsize=(5.2 * panels + 0.8, 4.2), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        _style(axis, f"trained on ({unit})" if key == "tokens" else unit)
        axis.set_xlim(0, max((row[key] for row in rows), default=1) / scale)
    _draw_loss(axes[0], train, valid)
    if bits[0]:
        _draw_bits(axes[1], bits, references or {})
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold")

    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, format="png")
    write_whole(png_path, picture.getvalue())


def smooth(values: Sequence[float | int], reach: int) -> list[float]:
    """Mean of each value and its neighbours up to `reach` away.

    Near the start the window shrinks to what is on the left, so that the steep fall is followed and not lagged behind;
    at the end, where a loss is flat and noisy, only its right side is cut off.
    """
    means = []
    for i in range(len(values)):
        near = values[i - min(reach, i) : i + min(reach, i) + 1]
        means.append(math.fsum(near) / len(near))
    return means


def apart(heights: Sequence[float | int], gap: float) -> list[float | int]:
    """The same heights in the same order, moved up where needed so that none are closer than `gap`: room for labels."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=placed.__getitem__)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed


def _series(rows: Sequence[Mapping[str, Any]], x: str, y: str, scale: float | int) -> tuple[list[float], list[float]]:
    points = [(row[x] / scale, row[y]) for row in rows if row.get(y) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def _unit(largest: float | int, noun: str) -> tuple[float, str]:
    for scale, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if largest >= 2 * scale:
            return scale, f"{word} {noun}"
    return 1.0, noun


def _style(axis: Any, xlabel: str) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(MUTED)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, length=3)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(xlabel, color=INK, fontsize=10)


def _heading(axis: Any, text: str) -> None:
    """What the y axis shows, where one reads first: above it, upright."""
    axis.set_title(text, loc="left", color=INK, fontsize=10)


def _draw_loss(axis: Any, train: tuple[list, list], valid: tuple[list, list]) -> None:
    _heading(axis, "loss (nats per token)")
    steps, losses = train
    if steps:
        smoothed = smooth(losses, len(losses) // 50)
        axis.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smoothed, color=TRAIN, linewidth=1.8, label=f"training {smoothed[-1]:.3f}")
        # The first steps fall from ln V in no time; what one wants to see is what follows.
        later = sorted([*losses[len(losses) // 50 :], *valid[1]])
        spread = later[-1] - later[0] or 1.0
        axis.set_ylim(later[0] - 0.06 * spread, later[-1] + 0.06 * spread)
    if valid[0]:
        best = min(range(len(valid[1])), key=valid[1].__getitem__)
        label = f"validation {valid[1][-1]:.3f}" + (f" (best {valid[1][best]:.3f})" if best < len(valid[1]) - 1 else "")
        axis.plot(*valid, color=VALID, linewidth=1.2, marker="o", markersize=4, label=label, clip_on=False)
    if steps or valid[0]:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def _draw_bits(axis: Any, bits: tuple[list, list], references: Mapping[str, float | int]) -> None:
    _heading(axis, "validation (bits per byte of text)")
    axis.plot(*bits, color=VALID, linewidth=1.2, marker="o", markersize=4, clip_on=False)
    for value in references.values():
        axis.axhline(value, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    shown = [*bits[1], *references.values()]
    spread = max(shown) - min(shown) or 1.0
    axis.set_ylim(min(shown) - 0.06 * spread, max(shown) + 0.06 * spread)
    # Each line is named at its right end, where nothing is in the way.
    names, ends = ["model", *references], [bits[1][-1], *references.values()]
    for name, value, height in zip(names, ends, apart(ends, 0.055 * 1.12 * spread), strict=True):
        axis.annotate(
            f"{name} {value:.3f}", (1.0, height), (6, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=9, color=VALID if name == "model" else INK,
            fontweight="bold" if name == "model" else "normal", annotation_clip=False,
        )  # fmt: skip
