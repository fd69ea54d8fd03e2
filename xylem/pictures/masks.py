"""Who sees whom: the masks that attention is given while a model reads, as grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.patches import Rectangle

from xylem.models import bert, build, gpt, vanilla
from xylem.models.attention import Attention, CrossAttention
from xylem.models.config import AttentionConfig, ModelConfig
from xylem.pictures import drawing

CELL, GAP = 0.135, 0.3  # inches: a cell, and between grids


@dataclass(frozen=True)
class Grid:
    """One mask: rows are queries, columns keys, x what may be seen.

    Attributes:
        title, note: two lines above it.
        rows: a string a query, with an x at each key that it sees and a dot elsewhere.
    """

    title: str
    note: str
    rows: tuple[str, ...]

    @classmethod
    def of(cls, title: str, note: str, mask: np.ndarray) -> Grid:
        """A grid of a Boolean array."""
        return cls(title, note, tuple("".join("x" if allowed else "." for allowed in row) for row in mask))


@dataclass(frozen=True)
class Grids:
    """Masks beside each other."""

    grids: tuple[Grid, ...]

    def __str__(self) -> str:
        return "\n".join("\n".join([one.title, one.note, *one.rows]) for one in self.grids)

    def draw(self, path: str | Path) -> None:
        """Write the picture as a PNG."""
        widths = [max(CELL * len(one.rows[0]), *(_width(one))) for one in self.grids]
        height = max(CELL * len(one.rows) for one in self.grids) + 0.75
        figure, axis = drawing.canvas(sum(widths) + GAP * (len(widths) - 1) + 0.5, height)
        left, small = 0.35, {"fontsize": drawing.SMALL, "color": drawing.QUIET, "va": "top"}
        axis.text(left - 0.12, 0.52 + CELL, "queries", rotation=90, ha="right", **small)
        for one, width in zip(self.grids, widths, strict=True):
            axis.text(left, 0.1, one.title, fontsize=drawing.TITLE, fontweight="bold", color=drawing.INK, va="top")
            axis.text(left, 0.28, one.note, **small)
            for i, row in enumerate(one.rows):
                for j, cell in enumerate(row):
                    fill = "#86b8a5" if cell == "x" else "#ffffff"
                    corner = left + CELL * j, 0.52 + CELL * i
                    axis.add_patch(Rectangle(corner, CELL, CELL, fc=fill, ec="#cbd2d9", lw=0.6))
            axis.text(left, 0.56 + CELL * len(one.rows), "keys", **small)
            left += width + GAP
        drawing.save(figure, path, str(self))


def _width(grid: Grid) -> tuple[float, float]:
    return drawing.text_width(grid.title, drawing.TITLE, True), drawing.text_width(grid.note, drawing.SMALL)


def seen(config: ModelConfig, *tokens: int, **segments: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """The masks of every attention that runs while a new model of this config reads rows of so many tokens.

    ``segments`` and ``decoder_segments`` go to the model as they are. Returns, in the order of the layers, the name of
    what attends (``decoder/...`` where there is a source to read) and what each query sees.
    """
    found: list[tuple[str, np.ndarray]] = []

    def spy(call: Any, args: Any, kwargs: Any, method: Any) -> Any:
        """An interceptor of module calls (flax)."""
        if isinstance(method.module, Attention | CrossAttention):
            queries, context = args[0].shape[1], args[1]
            decoding = context.memory is not None
            name = f"decoder/{method.module.name}" if decoding else f"{method.module.name}"
            if isinstance(method.module, Attention):
                mask = context.mask.array(queries, queries)
            else:
                mask = context.memory_mask.array(queries, context.memory.shape[1])
            jax.debug.callback(lambda mask: found.append((name, np.asarray(mask[0]))), mask, ordered=True)
        return call(*args, **kwargs)

    module = build(config)
    ids = [jnp.zeros((1, count), jnp.int32) for count in tokens]
    named: dict[str, Any] = {name: jnp.asarray([values]) for name, values in segments.items()}
    shapes = jax.eval_shape(module.init, jax.random.key(0), *ids)["params"]
    params = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)  # no mask depends on a weight

    @jax.jit
    def read(params: Any) -> None:
        with nn.intercept_methods(spy):
            module.apply({"params": params}, *ids, **named)

    read(params)
    jax.effects_barrier()
    return found


def who_sees_whom() -> Grids:
    """The masks of an encoder, a decoder, packed documents, and an encoder-decoder."""
    encoder, decoder = bert.bert(1, 8, 2, vocab_size=9, max_length=10), gpt.gpt(1, 8, 2, vocab_size=9, max_length=10)
    both = vanilla.vanilla(1, 8, 2, vocab_size=9, max_length=10)
    padded, packed = [1] * 7 + [0] * 3, [1] * 3 + [2] * 5 + [3] * 2
    crossing = dict(seen(both, 10, 6, segments=padded))
    grids = [
        Grid.of("encoder", "BERT; 3 of padding", seen(encoder, 10, segments=padded)[0][1]),
        Grid.of("decoder", "GPT-2; one document", seen(decoder, 10)[0][1]),
        Grid.of("decoder", "GPT-2; 3 packed documents", seen(decoder, 10, segments=packed)[0][1]),
        Grid.of("decoder on itself", "2017; 6 of target", crossing["decoder/attention"]),
        Grid.of("decoder on the source", "2017; 7 of source, 3 of padding", crossing["decoder/cross_attention"]),
    ]
    return Grids(tuple(grids))


def alternating(window: int = 4) -> Grids:
    """The masks of four layers of a GPT-3."""
    config = gpt.gpt3(4, 8, 2, 4)
    config = replace(config, vocab_size=9, max_length=12, attention=AttentionConfig(window=window))
    found = seen(config, 12)
    notes = ("dense", f"band of {window}")
    return Grids(tuple(Grid.of(f"layer {i}", notes[i % 2], mask) for i, (_, mask) in enumerate(found)))
