"""The pictures of parameter trees: drawn from the methods, and telling the truth about what learns."""

import math
import re
from pathlib import Path

import pytest

from xylem.peft import config as peft
from xylem.peft.calls import METHODS
from xylem.pictures import drawing, grafts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", grafts.PICTURES)
def test_a_picture_of_the_page_is_what_the_methods_give(name):
    path = ROOT / "docs" / "figures" / f"{name}.png"
    assert f"(figures/{name}.png)" in (ROOT / "docs" / "peft.md").read_text()
    assert drawing.described(path) == str(grafts.PICTURES[name]()), f"{path}: python scripts/grafts.py draws it anew"
    width = int.from_bytes(path.read_bytes()[16:20])  # of the header
    assert path.stat().st_size < 110_000 and width / drawing.DPI < 11, "too large for a README's column"


def test_a_line_says_whose_a_weight_is_and_whether_it_learns():
    tree = grafts.after(grafts.SMALL_LLAMA, "dora", peft.DoRAConfig(rank=8, targets="query"), "title")
    states = {line.name: line.state for line in tree.lines}
    assert states["a"] == states["b"] == states["magnitude"] == "new learns"
    assert states["scale"] == "new" and states["base"] == "own" and states["key/kernel"] == "own"
    assert tree.lines[0].name == "embed/embedding" and tree.lines[0].shape.split(grafts.TIMES) == ["256", "64"]
    (learning,) = re.findall(r"([\d,]+) learn", tree.note)
    sizes = [math.prod(map(int, line.shape.split(grafts.TIMES))) for line in tree.lines if line.state == "new learns"]
    assert sum(sizes) == int(learning.replace(",", "")) == 3 * (2 * 64 * 8 + 64)


def test_the_last_layer_is_cut_off_and_is_still_the_networks_own():
    tree = grafts.after(grafts.SMALL_LLAMA, "selection", peft.SelectionConfig(last=1), "title")
    states = [line.state for line in tree.lines if line.name == "query/kernel"]
    assert states == ["own", "own learns"]
    assert [line.name for line in tree.lines if line.name.startswith("layers")] == ["layers_0", "layers_1"]


def test_every_method_is_drawn():
    drawn = "\n".join(str(make()) for make in grafts.PICTURES.values())
    assert all(re.search(rf"\b{name}\b", drawn) for name in METHODS)
