"""The pictures of ``docs/architectures.md``: which model or function each is drawn from, by the name of its file.

Each entry makes a picture: ``draw(path)`` writes its file, and ``str`` says what it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from xylem.models import PRESETS, cells
from xylem.models.selective_scan import selective_scan
from xylem.models.state_config import CELL_GATES
from xylem.pictures import curves, drawing, flow, masks, texts

LICENSE = Path(__file__).parents[2] / "LICENSE"  # a text that every clone has, of which n-grams are counted


class Picture(Protocol):
    """What can be drawn."""

    def draw(self, path: str | Path) -> None:
        """Write the picture as a PNG."""
        ...


@dataclass(frozen=True)
class Flows:
    """Flows beside each other."""

    flows: tuple[flow.Flow, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.flows))

    def draw(self, path: str | Path) -> None:
        """Write the picture as a PNG."""
        drawing.draw_flows(self.flows, path)


def model(preset: str) -> Flows:
    """The flow of a published model."""
    return Flows((flow.of_model(PRESETS[preset](), preset),))


def recurrent(width: int = 384) -> Flows:
    """One step of each recurrent cell, with the products that its layer makes."""

    def step(cell: str, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"state": cells.layer(cell, inputs["params"], inputs["x"], inputs["state"])[1]}

    made = []
    for cell, gates in CELL_GATES.items():
        weights = {"kernel": _shape(width, gates * width), "bias": _shape(gates * width)}
        state = {name: _shape(1, width) for name in cells.CELLS[cell].state}
        inputs = {"params": {"input": weights, "recurrent": weights}, "x": _shape(1, 1, width), "state": state}
        made.append(flow.of_function(partial(step, cell), inputs, cell))
    return Flows(tuple(made))


def mamba() -> Flows:
    """A Mamba's layer, and one step of its selective scan."""

    def step(inputs: dict[str, Any]) -> dict[str, Any]:
        y, last = selective_scan(D=inputs.pop("params")["D"], start=inputs.pop("h"), **inputs)
        return {"h": last, "y": y}

    config: Any = PRESETS["mamba_130m"]()
    inner, states = config.d_inner, config.state_size
    inputs = {"params": {"D": _shape(inner)}, "A": _shape(inner, states), "h": _shape(1, states, inner)}
    inputs |= {name: _shape(1, 1, inner) for name in ("x", "delta")}
    inputs |= {name: _shape(1, 1, states) for name in ("B", "C")}
    scan = flow.of_function(step, inputs, "one step of selective_scan")
    return Flows((*model("mamba_130m").flows, scan))


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PICTURES: dict[str, Callable[[], Picture]] = {
    "ngram": partial(curves.kneser_ney, LICENSE),
    "recurrent": recurrent,
    "transformer": partial(model, "transformer_base"),
    "masks": masks.who_sees_whom,
    "gpt1": partial(model, "gpt1"),
    "bert": partial(model, "bert_base"),
    "bert_text": texts.bert,
    "gpt2": partial(model, "gpt2"),
    "roberta_text": texts.roberta,
    "albert": partial(model, "albert_base"),
    "albert_text": texts.albert,
    "bart": partial(model, "bart_base"),
    "bart_text": texts.bart,
    "t5": partial(model, "t5_1_1_small"),
    "t5_text": texts.t5,
    "gpt3": masks.alternating,
    "llama": partial(model, "llama_7b"),
    "llama2": partial(model, "llama2_70b"),
    "llama3": curves.wavelengths,
    "mamba": mamba,
}
