"""Flows as pictures: boxes, arrows, one palette. How any picture becomes a small file that says what it shows.

What a picture was drawn from stands in the file's ``Description``, so whether a picture is out of date is told without
drawing it again (``described``). Text is 8 points or more.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath
from PIL import Image, PngImagePlugin

from xylem.files import write_whole
from xylem.pictures.flow import Flow, Node
from xylem.pictures.layout import PAD, Box, Plan, plan
from xylem.training.plots import GRID, INK, MUTED, TRAIN

DPI = 120
TITLE, SMALL = 9.0, 8.0  # points
LINE = 0.15  # inches from line to line
QUIET = "#52606d"  # small text, dark enough to read
FILLS = {"module": "#e3f1ea", "function": "#f3f4f6", "join": "#ffffff", "layers": "#fbeccb", "input": "#ffffff"}
EDGES = {"module": TRAIN, "function": MUTED, "join": INK, "layers": "#b7791f", "input": GRID}
PANEL_GAP, MARGIN, HEADING = 0.4, 0.1, 0.32
CLUSTER, NOTE = "#f7f9fb", "#2b6cb0"
# All that a picture's file has: 16 colours are half a byte a pixel. Between the inks and the grounds lie the edges of
# letters.
PALETTE = (
    *("#ffffff", CLUSTER, GRID, "#e3f1ea", "#f3f4f6", "#fbeccb", "#d6e4f0"),
    *(INK, QUIET, MUTED, "#aab4bd", "#cbd2d9", TRAIN, "#86b8a5", NOTE, "#b7791f"),
)


def draw_flows(flows: Sequence[Flow], path: str | Path) -> None:
    """Draw flows beside each other as a PNG that replaces ``path``: of each model its own, then a layer's (of an
    encoder-decoder the decoder's, which has all that the encoder's has)."""
    panels = [one for flow in flows for one in (flow, *flow.layers[-1:])]
    plans = [plan(flow, [_size(node) for node in flow.nodes]) for flow in panels]
    width = sum(one.width for one in plans) + PANEL_GAP * (len(plans) - 1) + 2 * MARGIN
    height = max(one.height for one in plans) + HEADING + 2 * MARGIN
    figure, axis = canvas(width, height)
    left = MARGIN
    for flow, made in zip(panels, plans, strict=True):
        axis.text(left, MARGIN, flow.name, fontsize=TITLE, fontweight="bold", color=INK, va="top")
        _draw(axis, flow, made, left, MARGIN + HEADING)
        left += made.width + PANEL_GAP
    save(figure, path, "\n".join(map(str, flows)))


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A white figure of so many inches, and an axis over all of it in inches, y downwards."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    return figure, axis


def save(figure: Figure, path: str | Path, description: str) -> None:
    """Write a figure as a PNG of few colours, the same bytes each time; ``description`` is what it was drawn from."""
    agg = FigureCanvasAgg(figure)
    agg.draw()
    picture = _few_colours(np.asarray(agg.buffer_rgba())[..., :3])
    about = PngImagePlugin.PngInfo()
    about.add_itxt("Description", description)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, pnginfo=about, dpi=(DPI, DPI))
    write_whole(path, file.getvalue())


def _few_colours(pixels: np.ndarray) -> Image.Image:
    """Every pixel as the nearest colour of the palette."""
    table = bytes.fromhex("".join(colour[1:] for colour in PALETTE))
    packed = pixels.astype(np.int64) @ (65536, 256, 1)
    found, where = np.unique(packed, return_inverse=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    known = np.frombuffer(table, np.uint8).reshape(-1, 3).astype(np.int64)
    nearest = ((colours[:, None] - known[None]) ** 2).sum(2).argmin(1).astype(np.uint8)
    picture = Image.fromarray(nearest[where].reshape(packed.shape), "P")
    picture.putpalette(table)
    return picture


def described(path: str | Path) -> str:
    """What a picture was drawn from."""
    with Image.open(path) as picture:
        picture.load()
        return str(picture.info.get("Description", ""))


def text_width(text: str, points: float, bold: bool = False) -> float:
    """How wide a line of text is, in inches."""
    if not text:
        return 0.0
    font = FontProperties(weight="bold" if bold else "normal")
    return TextPath((0, 0), text, size=points, prop=font).get_extents().width / 72


def _size(node: Node) -> tuple[float, float]:
    """Width and height of a node's box."""
    if node.kind == "join" and not node.note and not node.parameters and len(node.title) < 3:
        return 0.24, 0.24
    small = max((text_width(line, SMALL) for line in _small(node)), default=0.0)
    width = max(text_width(node.title, TITLE, node.kind != "input"), small) + 0.16
    return max(width, 0.4), LINE * (1 + len(_small(node))) + 0.1


def _small(node: Node) -> list[str]:
    return [*([node.note] if node.note else []), *node.lines]


def _draw(axis: Any, flow: Flow, made: Plan, left: float, top: float) -> None:
    """One panel: what belongs to one module on one ground, then edges, then boxes."""
    boxes = [Box(box.x + left, box.y + top, box.width, box.height) for box in made.boxes]
    for owner in dict.fromkeys(node.owner for node in flow.nodes if node.owner):
        mine = {number for number, node in enumerate(flow.nodes) if node.owner == owner}
        aside = sum(boxes[b].x - boxes[a].x for a, b in flow.edges if a in mine and b not in mine)
        inside = [route for edge, route in zip(flow.edges, made.routes, strict=True) if mine.issuperset(edge)]
        lanes = [x + left for route in inside for x, _ in route]
        _ground(axis, owner, [boxes[number] for number in sorted(mine)], lanes, aside)
    for route in made.routes:
        _arrow(axis, [(x + left, y + top) for x, y in route])
    for node, box in zip(flow.nodes, boxes, strict=True):
        _box(axis, node, box)


def _ground(axis: Any, owner: str, boxes: Sequence[Box], lanes: Sequence[float], aside: float) -> None:
    """The ground of what belongs to a module: its boxes, and the lanes between them; its name stands where what leaves
    it, ``aside`` to the right, does not pass."""
    left = min([box.x - box.width / 2 for box in boxes] + [*lanes]) - PAD
    right = max([box.x + box.width / 2 for box in boxes] + [*lanes]) + PAD
    top = min(box.y - box.height / 2 for box in boxes) - PAD
    bottom = max(box.y + box.height / 2 for box in boxes) + 0.2
    look = {"boxstyle": "round,pad=0,rounding_size=0.08", "fc": CLUSTER, "ec": GRID, "lw": 0.8, "zorder": 0}
    axis.add_patch(FancyBboxPatch((left, top), right - left, bottom - top, **look))
    lowest = max(boxes, key=lambda box: box.y)
    x, side = (left + 0.05, "left") if aside > 0.1 or lowest.x > (left + right) / 2 + 0.1 else (right - 0.05, "right")
    clear = {"facecolor": CLUSTER, "edgecolor": "none", "pad": 0.5}
    look = {"fontsize": SMALL, "color": QUIET, "style": "italic", "bbox": clear, "zorder": 1.5}
    axis.text(x, bottom - 0.04, owner, ha=side, va="bottom", **look)


def _arrow(axis: Any, points: Sequence[tuple[float, float]]) -> None:
    """An edge: straight where two points lie above or beside each other, else a curve that begins and ends upright."""
    vertices: list[tuple[float, float]] = [points[0]]
    codes: list[Any] = [Curve.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 == x1 and (x1, y1) != points[-1] and points[-1][1] == y1:  # the next one goes sideways: a round corner
            turn = 0.1 if points[-1][0] > x1 else -0.1
            vertices = [*vertices, (x1, y1 - 0.1), (x1, y1), (x1 + turn, y1)]
            codes = [*codes, Curve.LINETO, *[Curve.CURVE3] * 2]
        elif x0 == x1 or y0 == y1:
            vertices, codes = [*vertices, (x1, y1)], [*codes, Curve.LINETO]
        else:
            middle = (y0 + y1) / 2
            vertices, codes = [*vertices, (x0, middle), (x1, middle), (x1, y1)], [*codes, *[Curve.CURVE4] * 3]
    arrow = FancyArrowPatch(
        path=Curve(vertices, codes), arrowstyle="-|>,head_length=3,head_width=1.6", mutation_scale=1.4, lw=0.9,
        color=QUIET, shrinkA=0, shrinkB=0, zorder=1,
    )  # fmt: skip
    axis.add_patch(arrow)


def _box(axis: Any, node: Node, box: Box) -> None:
    kind = "module" if node.kind == "join" and node.parameters else node.kind
    fill, edge = FILLS.get(kind, "#ffffff"), EDGES.get(kind, GRID)
    if box.width == box.height == 0.24:
        axis.add_patch(Circle((box.x, box.y), 0.12, fc=fill, ec=edge, lw=0.9, zorder=2))
    elif node.kind not in ("input", "output"):
        corner = box.x - box.width / 2, box.y - box.height / 2
        look = {"boxstyle": "round,pad=0,rounding_size=0.05", "fc": fill, "ec": edge, "lw": 0.9, "zorder": 2}
        axis.add_patch(FancyBboxPatch(corner, box.width, box.height, **look))
    lines = _small(node)
    y = box.y - LINE * len(lines) / 2
    weight = "normal" if node.kind in ("input", "output", "join") else "bold"
    style = "italic" if node.kind in ("input", "output") else "normal"
    middle = {"ha": "center", "va": "center_baseline", "zorder": 3}
    axis.text(box.x, y, node.title, fontsize=TITLE, fontweight=weight, style=style, color=INK, **middle)
    for number, line in enumerate(lines, 1):
        colour = NOTE if line == node.note else QUIET
        axis.text(box.x, y + LINE * number, line, fontsize=SMALL, color=colour, **middle)
