"""Pictures: the loss curve of a run, the scaling law of many, how far gradients reach, the ladder of models, ways to
fine-tune."""

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

    Reads of each row `step`, `nll` (nats a token; `loss` where no row has it), and where present `tokens` (trained on
    so far; the axis is steps without it), `validation_loss` and `validation_bits_per_byte`. `references` are horizontal
    lines of the right panel in bits per byte, as {"xz": 2.5}; the panel is left out where there is nothing to show in
    it. The picture replaces `png_path` whole. A file without a row draws empty axes.
    """
    rows = [json.loads(line) for line in Path(metrics_path).read_text().splitlines() if line.strip()]
    key = "tokens" if rows and all(row.get("tokens") is not None for row in rows) else "step"
    scale, unit = _unit(max((row[key] for row in rows), default=0), "tokens" if key == "tokens" else "steps")
    # What validation measures: the loss may hold more, a second objective or label smoothing.
    train = _series(rows, key, "nll" if any("nll" in row for row in rows) else "loss", scale)
    valid = _series(rows, key, "validation_loss", scale)
    bits = _series(rows, key, "validation_bits_per_byte", scale)

    figure, axes = _figure(2 if bits[0] else 1)
    for axis in axes:
        _style(axis, f"trained on ({unit})" if key == "tokens" else unit)
        axis.set_xlim(0, max((row[key] for row in rows), default=1) / scale)
    _draw_loss(axes[0], train, valid)
    if bits[0]:
        _draw_bits(axes[1], bits, references or {})
    _save(figure, png_path, title)


def scaling_curves(found: Mapping[str, Any], png_path: str | Path) -> None:
    """Draw what ``scripts/scaling.py`` found (its ``scaling.json``) as a PNG that replaces `png_path` whole.

    On the left the loss against size at each budget, with the parabola through its runs and that one's minimum; in the
    middle the runs of each size against tokens, with the fitted law; on the right the compute-optimal size against
    the budget, by the law and by the parabolas, and at the budget asked for with its interval.
    """
    figure, axes = _figure(3)
    _draw_isoflop(axes[0], found)
    _draw_law(axes[1], found)
    _draw_optimum(axes[2], found)
    _save(figure, png_path)


def gradient_curves(found: Mapping[str, Any], png_path: str | Path) -> None:
    """Draw what ``scripts/gradient_flow.py`` found as a PNG that replaces `png_path` whole: one panel a stage.

    ``found["flow"]`` is {stage: {cell: powers of ten of what is left of a gradient, k steps back}}, with ``low`` and
    ``high`` beside the ``mean`` of each.
    """
    stages = found["flow"]
    figure, axes = _figure(len(stages), sharey=True)
    for axis, (stage, cells) in zip(axes, stages.items(), strict=True):
        _style(axis, "steps back in time")
        _heading(axis, f"gradient that arrives, over the one sent: {stage}")
        for colour, (cell, curve) in zip(_colours(len(cells)), cells.items(), strict=True):
            steps = range(len(curve["mean"]))
            axis.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
            axis.plot(steps, curve["mean"], color=colour, linewidth=1.8, label=cell)
        axis.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:g}}}$")
        axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    _save(figure, png_path)


def ladder_curves(rows: Sequence[Mapping[str, Any]], png_path: str | Path) -> None:
    """Draw what ``scripts/ladder.py`` found as a PNG that replaces `png_path` whole.

    Each row is a model: its ``rung``, a ``curve`` of (tokens, validation bits per byte) and where it ended, ``tokens``
    and ``bits_per_byte``; ``tokens_per_second``, and ``memory`` in bytes. On the left the curves, their ends as dots;
    then speed and memory as bars, in the same order and colours.
    """
    figure, axes = _figure(3)
    colours = _colours(len(rows))
    scale, unit = _unit(max(row["tokens"] for row in rows), "tokens")
    _style(axes[0], f"read ({unit})")
    _heading(axes[0], "validation (bits per byte of text)")
    for colour, row in zip(colours, rows, strict=True):
        label = f"{row['rung']} {row['bits_per_byte']:.3f}"
        axes[0].plot([tokens / scale for tokens, _ in row["curve"]], [bits for _, bits in row["curve"]], color=colour)
        axes[0].plot(row["tokens"] / scale, row["bits_per_byte"], "o", color=colour, markersize=7, label=label)
    axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    for axis, key, over, heading in (
        (axes[1], "tokens_per_second", 1e3, "thousand tokens a second, counting or training"),
        (axes[2], "memory", 1e9, "peak memory of the process, GB"),
    ):
        _bars(axis, {row["rung"]: row[key] / over for row in rows}, colours, heading)
    axes[1].set_xscale("log")
    _save(figure, png_path)


def method_points(rows: Sequence[Mapping[str, Any]], png_path: str | Path) -> None:
    """Draw what ``scripts/compare_methods.py`` found as a PNG that replaces `png_path` whole.

    Each row is a method: its ``title``, how many ``parameters`` learn, its held-out ``loss``. Where none learn it is
    the base, whose loss the heading tells.
    """
    base = next((row["loss"] for row in rows if not row["parameters"]), None)
    rows = sorted((row for row in rows if row["parameters"]), key=lambda row: row["loss"])
    figure, (axis,) = _figure(1)
    figure.set_size_inches(9.0, 5.2)
    _style(axis, "parameters that learn")
    before = "" if base is None else f"; the base has {base:.2f}"
    _heading(axis, f"loss of held-out answers (nats per token{before})")
    axis.set_xscale("log")
    axis.plot([row["parameters"] for row in rows], [row["loss"] for row in rows], "o", color=TRAIN, markersize=6)
    axis.margins(x=0.06, y=0.08)
    lowest, highest = axis.get_ylim()
    for group in _neighbours(rows):
        # The names of what lies close stand in a column on its right, each with a line to its point.
        right = max(row["parameters"] for row in group)
        heights = apart([row["loss"] for row in group], 0.036 * (highest - lowest))
        for row, height in zip(group, heights, strict=True):
            line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
            axis.annotate(
                row["title"], (row["parameters"], row["loss"]), (1.25 * right, height), va="center", fontsize=8,
                color=INK, arrowprops=line, annotation_clip=False,
            )  # fmt: skip
    _save(figure, png_path)


def _neighbours(rows: Sequence[Mapping[str, Any]], ratio: float = 3.0) -> list[list[Mapping[str, Any]]]:
    """Rows in groups, apart by more than ``ratio`` times the parameters; in each the order of the rows."""
    sizes = sorted({row["parameters"] for row in rows})
    starts = [size for before, size in itertools.pairwise([0, *sizes]) if size > ratio * before]
    of = lambda row: sum(start <= row["parameters"] for start in starts)  # noqa: E731
    return [[row for row in rows if of(row) == number] for number in range(1, len(starts) + 1)]


def loss_curves(curves: Mapping[str, Sequence[Sequence[float | int]]], png_path: str | Path) -> None:
    """Draw validation losses as a PNG that replaces `png_path` whole: name -> points of (tokens, nats a token)."""
    figure, axes = _figure(1)
    scale, unit = _unit(max(tokens for points in curves.values() for tokens, _ in points), "tokens")
    _style(axes[0], f"read ({unit})")
    _heading(axes[0], "validation loss (nats per token)")
    for colour, (name, points) in zip(_colours(len(curves)), curves.items(), strict=True):
        label = f"{name} {points[-1][1]:.3f}"
        axes[0].plot(
            [tokens / scale for tokens, _ in points],
            [loss for _, loss in points],
            color=colour,
            label=label,
            marker=".",
        )
    axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    _save(figure, png_path)


def matrices(
    panels: Mapping[str, Mapping[str, Sequence[float | int]]], columns: Sequence[str], png_path: str | Path
) -> None:
    """Draw tables of numbers as a PNG that replaces `png_path` whole: heading -> row -> a number a column.

    A cell is the darker the larger its number is within its column.
    """
    figure, axes = _figure(len(panels), sharey=True)
    for axis, (heading, rows) in zip(axes, panels.items(), strict=True):
        _heading(axis, heading)
        for column, numbers in enumerate(zip(*rows.values(), strict=True)):
            low, spread = min(numbers), (max(numbers) - min(numbers)) or 1.0
            for row, number in enumerate(numbers):
                depth = (number - low) / spread
                axis.add_patch(_cell(column, row, depth))
                colour = "white" if depth > 0.6 else INK
                axis.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=9, color=colour)
        axis.set_xlim(-0.5, len(columns) - 0.5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xticks(range(len(columns)), columns, color=INK, fontsize=9)
        axis.set_yticks(range(len(rows)), list(rows), color=INK, fontsize=9)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    _save(figure, png_path)


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


def _figure(panels: int, sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels + 0.8, 4.2), dpi=150, layout="constrained", facecolor="white")
    return figure, figure.subplots(1, panels, squeeze=False, sharey=sharey)[0]


def _save(figure: Any, png_path: str | Path, title: str = "") -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, format="png")
    write_whole(png_path, picture.getvalue())


def _colours(count: int) -> list[Any]:
    """Colours of an ordered family of curves, dark to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * i / max(1, count - 1)) for i in range(count)]


def _cell(column: int, row: int, depth: float) -> Any:
    """A square of a table, from pale to dark."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=colormaps["Blues"](0.1 + 0.75 * depth))


def _bars(axis: Any, values: Mapping[str, float], colours: Sequence[Any], heading: str) -> None:
    """Named bars from top to bottom, each with its value at its end."""
    _style(axis, "")
    _heading(axis, heading)
    axis.grid(visible=False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="x", length=0, labelbottom=False, which="both")
    bars = axis.barh(list(values), list(values.values()), color=colours, height=0.6)
    texts = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values.values()]
    axis.bar_label(bars, texts, padding=4, fontsize=9, color=INK)
    axis.invert_yaxis()
    axis.margins(x=0.15)


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


def _logarithmic(axis: Any, which: str) -> None:
    """One of an axis' two scales by logarithms, named at 1, 2 and 5 times each power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+0", "e").replace("e+", "e"))
    scale.set_minor_formatter(NullFormatter())


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


def _between(low: float | int, high: float | int, count: int = 100) -> list[float]:
    """Numbers from ``low`` to ``high`` in equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def _by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[float | int, list[Mapping[str, Any]]]:
    """Rows by the value of ``key``, in its order."""
    values = sorted({row[key] for row in rows})
    return {value: [row for row in rows if row[key] == value] for value in values}


def _draw_isoflop(axis: Any, found: Mapping[str, Any]) -> None:
    _style(axis, "parameters")
    _heading(axis, "validation loss (nats per token) at a budget")
    parabolas = {row["flops"]: row["parabola"] for row in found["isoflop"]}
    groups = _by(found["runs"], "flops")
    for colour, (flops, rows) in zip(_colours(len(groups)), groups.items(), strict=True):
        rows = sorted(rows, key=lambda row: row["N"])
        label = f"{flops:.2g} FLOPs"
        axis.plot([row["N"] for row in rows], [row["loss"] for row in rows], "o", color=colour, label=label)
        if (at := parabolas[flops]) is not None:
            sizes = _between(rows[0]["N"], rows[-1]["N"])
            heights = [at["bottom"] + at["curvature"] * math.log(n / at["N"]) ** 2 for n in sizes]
            axis.plot(sizes, heights, color=colour, linewidth=1.2)
            axis.plot(at["N"], at["bottom"], "v", color=VALID, markersize=8, zorder=3)
    _logarithmic(axis, "x")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_law(axis: Any, found: Mapping[str, Any]) -> None:
    _style(axis, "tokens trained on")
    law = found["law"]
    _heading(axis, "loss = {E:.2f} + {A:.3g} / N^{alpha:.3f} + {B:.3g} / D^{beta:.3f}".format(**law))
    groups, tokens = _by(found["runs"], "N"), [row["D"] for row in found["runs"]]
    for colour, (n, rows) in zip(_colours(len(groups)), groups.items(), strict=True):
        line = _between(min(tokens), max(tokens))
        heights = [law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"] for d in line]
        axis.plot(line, heights, color=colour, linewidth=1.0)
        axis.plot([row["D"] for row in rows], [row["loss"] for row in rows], "o", color=colour, label=f"{n:,}")
    _logarithmic(axis, "x")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, title="parameters")


def _draw_optimum(axis: Any, found: Mapping[str, Any]) -> None:
    _style(axis, "budget (FLOPs)")
    _heading(axis, "compute-optimal parameters")
    law, budget, best = found["law"], found["budget"], found["optimum"]
    power = law["beta"] / (law["alpha"] + law["beta"])
    budgets = _between(min([budget, *(row["flops"] for row in found["isoflop"])]) / 2, 2 * budget)
    axis.plot(budgets, [best["N"] * (c / budget) ** power for c in budgets], color=TRAIN, label="law")
    minima = [(row["flops"], row["parabola"]["N"]) for row in found["isoflop"] if row["parabola"]]
    axis.plot([c for c, _ in minima], [n for _, n in minima], "v", color=VALID, markersize=8, label="parabolas")
    low, high = found["optimum_intervals"]["N"]
    axis.plot(
        [budget, budget], [low, high], color=TRAIN, linewidth=3, alpha=0.4, label=f"{found['draws']['level']:.0%}"
    )
    axis.plot(budget, best["N"], "o", color=TRAIN)
    _logarithmic(axis, "x")
    _logarithmic(axis, "y")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)
