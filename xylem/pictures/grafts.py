"""What a method of ``peft`` makes of a parameter tree: the tree before and after, and which of it learns.

Trees are those that the methods themselves give, by shapes alone: no weight is made.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from matplotlib.patches import FancyBboxPatch

from xylem.models import build, gpt, llama, mamba
from xylem.models.leaves import Grafted, is_leaf
from xylem.peft import config as peft
from xylem.peft.calls import METHODS
from xylem.peft.methods import prefix, slora
from xylem.peft.tree import Predicate
from xylem.pictures import drawing
from xylem.sharding import path_name

State = Literal["", "own", "own learns", "new", "new learns"]
# Fill, edge and ink of a weight; a node has none.
LOOKS: dict[str, tuple[str, str, str]] = {
    "own": ("#ffffff", "#cbd2d9", drawing.QUIET),
    "new": ("#d6e4f0", "#2b6cb0", drawing.INK),
    "new learns": ("#e3f1ea", "#2a7f62", drawing.INK),
    "own learns": ("#fbeccb", "#b7791f", drawing.INK),
}
LEGEND = {
    "own": "the network's own, frozen",
    "own learns": "its own, learns",
    "new": "new, frozen",
    "new learns": "new, learns",
}
INDENT, STEP, PAD, GAP, MARGIN = 0.11, 0.165, 0.06, 0.16, 0.12  # inches
COLUMNS = 4
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Line:
    """A line of a tree.

    Attributes:
        depth: how many nodes it lies in.
        name: its own part of the path.
        shape: of a weight, and its type where that is not float32; empty for a node.
        state: whose weight it is, and whether it learns.
    """

    depth: int
    name: str
    shape: str = ""
    state: State = ""

    def __str__(self) -> str:
        return "  " * self.depth + " ".join(part for part in (self.name, self.shape, self.state) if part)


@dataclass(frozen=True)
class Tree:
    """A tree, what made it, and how many of its numbers learn."""

    title: str
    note: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return "\n".join([self.title, self.note, *map(str, self.lines)])


@dataclass(frozen=True)
class Trees:
    """Trees in rows of a few."""

    trees: tuple[Tree, ...] = field(default_factory=tuple)

    def __str__(self) -> str:
        return "\n".join(map(str, self.trees))

    def draw(self, path: str | Path) -> None:
        """Write the picture as a PNG."""
        rows = [self.trees[at : at + COLUMNS] for at in range(0, len(self.trees), COLUMNS)]
        widths = [max(map(_width, self.trees[column::COLUMNS])) for column in range(min(COLUMNS, len(self.trees)))]
        heights = [0.45 + STEP * max(len(tree.lines) for tree in row) for row in rows]
        width = sum(widths) + GAP * (len(widths) - 1) + 2 * MARGIN
        figure, axis = drawing.canvas(width, sum(heights) + 0.28 + 2 * MARGIN)
        _legend(axis, MARGIN, MARGIN + 0.09)
        top = MARGIN + 0.28
        for row, height in zip(rows, heights, strict=True):
            left = MARGIN
            for tree, each in zip(row, widths, strict=False):
                _draw(axis, tree, left, top, each)
                left += each + GAP
            top += height
        drawing.save(figure, path, str(self))


def _text(axis: Any, x: float, y: float, text: str, **look: Any) -> None:
    axis.text(x, y, text, va="center_baseline", **{"fontsize": drawing.SMALL, "color": drawing.QUIET, **look})


def _width(tree: Tree) -> float:
    """How wide a panel must be."""
    lines = [
        INDENT * line.depth
        + drawing.text_width(line.name, drawing.SMALL)
        + drawing.text_width(line.shape, drawing.SMALL)
        for line in tree.lines
    ]
    heads = drawing.text_width(tree.title, drawing.TITLE, True), drawing.text_width(tree.note, drawing.SMALL)
    return max(*(line + 0.18 + 2 * PAD for line in lines), *heads)


def _legend(axis: Any, left: float, y: float) -> None:
    for state, text in LEGEND.items():
        fill, edge, _ = LOOKS[state]
        axis.add_patch(FancyBboxPatch((left, y - 0.06), 0.2, 0.12, **_rounded(fill, edge)))
        _text(axis, left + 0.27, y, text)
        left += 0.27 + drawing.text_width(text, drawing.SMALL) + 0.25


def _rounded(fill: str, edge: str) -> dict[str, Any]:
    return {"boxstyle": "round,pad=0,rounding_size=0.03", "fc": fill, "ec": edge, "lw": 0.7}


def _draw(axis: Any, tree: Tree, left: float, top: float, width: float) -> None:
    """A panel: two lines of heading, then a line a node or weight, shapes flush right."""
    _text(axis, left, top + 0.08, tree.title, fontsize=drawing.TITLE, fontweight="bold", color=drawing.INK)
    _text(axis, left, top + 0.24, tree.note)
    for number, line in enumerate(tree.lines):
        y, x = top + 0.42 + STEP * number, left + INDENT * line.depth
        if line.state:
            fill, edge, ink = LOOKS[line.state]
            size = left + width - x, STEP - 0.025
            axis.add_patch(FancyBboxPatch((x, y - size[1] / 2), *size, **_rounded(fill, edge)))
            _text(axis, x + PAD, y, line.name, color=ink)
            _text(axis, left + width - PAD, y, line.shape, ha="right", color=ink)
        else:
            _text(axis, x, y, line.name, style="italic")


def lines_of(tree: Any, own: set[str], learns: Predicate) -> tuple[Line, ...]:
    """The lines of a tree, of which ``own`` are the paths that were there before; runs of layers may be cut since."""
    made: list[Line] = []

    def walk(value: Any, label: str, path: str, depth: int, known: bool) -> None:
        known = known or re.sub(r"layers_\d+", "layers", path) in own
        if isinstance(value, Mapping) and len(value) == 1 and label:  # query/kernel is one line
            ((only, inner),) = value.items()
            walk(inner, f"{label}/{only}", f"{path}/{only}", depth, known)
        elif isinstance(value, Mapping):
            if label:
                made.append(Line(depth, label))
            for name, inner in value.items():
                walk(inner, name, f"{path}/{name}".lstrip("/"), depth + bool(label), known)
        elif is_leaf(value):
            made.append(Line(depth, f"{label}: {type(value).__name__}"))
            for name in (one.name for one in dataclasses.fields(value) if one.metadata.get("pytree_node", True)):
                inner = known and (name == "base" or not isinstance(value, Grafted))
                walk(getattr(value, name), name, f"{path}/{name}", depth + 1, inner)
        elif value is not None:
            shape = TIMES.join(map(str, value.shape)) or "1"
            kind = "" if value.dtype == jnp.float32 else f" {value.dtype.name}"
            state: Any = ("own" if known else "new") + (" learns" if learns(path, value) else "")
            made.append(Line(depth, label, shape + kind, state))

    walk(tree, "", "", 0, False)
    return tuple(made)


SMALL_LLAMA = llama.llama(3, 64, 4, 2, 128, 256, 96, rope_theta=1e4, norm_eps=1e-5, head="tied")
SMALL_GPT = gpt.gpt(3, 64, 4, 256, 96)
SMALL_MAMBA = mamba.mamba(3, 64, 256, 96)
ATTENTION = "attention/(query|value)/kernel"


def before(config: Any, title: str) -> Tree:
    """The tree of a network as it is born."""
    base = _born(config)
    return Tree(title, f"{_count(base, lambda *_: True):,} numbers", lines_of(base, _paths(base), lambda *_: False))


def after(config: Any, name: str, method: Any, title: str, change: Callable[[Any], Any] = lambda tree: tree) -> Tree:
    """The tree that a method makes of it, perhaps changed on."""
    base = _born(config)
    grafted = jax.eval_shape(lambda base, key: change(METHODS[name].graft(base, key, method)), base, jax.random.key(0))
    learns = METHODS[name].trainable(grafted, method)
    return Tree(title, f"{_count(grafted, learns):,} learn", lines_of(grafted, _paths(base), learns))


def pool(config: Any, ranks: Sequence[int], title: str) -> Tree:
    """The tree of several adapters that serve one batch."""
    base = _born(config)

    def make(base: Any, key: Any) -> Any:
        settings = [peft.LoRAConfig(rank=rank, targets=ATTENTION) for rank in ranks]
        return slora.stack(base, [METHODS["lora"].graft(base, key, one) for one in settings])

    made = jax.eval_shape(make, base, jax.random.key(0))
    note = f"{len(ranks)} adapters, ranks {', '.join(map(str, ranks))}"
    return Tree(title, note, lines_of(made, _paths(base), lambda *_: False))


def _born(config: Any) -> Any:
    init = build(config).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def _paths(tree: Any) -> set[str]:
    return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _count(tree: Any, learns: Predicate) -> int:
    """How many numbers learn."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(math.prod(x.shape) for path, x in leaves if learns(path_name(path), x))


def beside() -> Trees:
    """Methods that put something beside a weight."""
    small, low = SMALL_LLAMA, {"rank": 8, "targets": ATTENTION}
    return Trees(
        (
            before(small, "before: a small LLaMA"),
            after(small, "lora", peft.LoRAConfig(**low), "peft.lora, relora, olora"),
            after(small, "dora", peft.DoRAConfig(**low), "peft.dora"),
            after(small, "adalora", peft.AdaLoRAConfig(targets=ATTENTION), "peft.adalora"),
            after(small, "ia3", peft.IA3Config(), "peft.ia3"),
            after(small, "qlora", peft.QLoRAConfig(**low), "peft.qlora"),
            after(small, "qlora", peft.QLoRAConfig(**low, kind="int8"), 'peft.qlora(kind="int8")'),
            pool(small, (8, 16, 4), "slora.stack"),
        )
    )


def added() -> Trees:
    """Methods that add nodes."""
    small = SMALL_LLAMA
    return Trees(
        (
            after(small, "adapter", peft.AdapterConfig(size=16), "peft.adapter (Houlsby)"),
            after(small, "prompt", peft.PromptConfig(length=20), "peft.prompt"),
            after(small, "prefix", peft.PrefixConfig(hidden=32), "peft.prefix, as it learns"),
            after(small, "prefix", peft.PrefixConfig(hidden=32), "folded, or prefix(hidden=0)", prefix.fold),
            after(SMALL_MAMBA, "state", peft.StateConfig(), "peft.state, of a small Mamba"),
        )
    )


def selected() -> Trees:
    """Methods that choose among the weights that are there."""
    small, biased = SMALL_LLAMA, SMALL_GPT
    return Trees(
        (
            before(biased, "before: a small GPT-2"),
            after(biased, "bitfit", peft.BitFitConfig(), "peft.bitfit"),
            after(small, "bitfit", peft.BitFitConfig(missing="add"), 'peft.bitfit(missing="add")'),
            after(small, "selection", peft.SelectionConfig(last=1), "peft.selection(last=1)"),
            after(small, "selection", peft.SelectionConfig(targets="norm/"), 'peft.selection(targets="norm/")'),
            after(small, "child", peft.ChildConfig(), "peft.child, all learn in part"),
        )
    )


PICTURES: dict[str, Callable[[], Trees]] = {"grafts_beside": beside, "grafts_added": added, "grafts_selected": selected}
