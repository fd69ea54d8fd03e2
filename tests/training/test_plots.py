"""The loss curve: a readable PNG from whatever a run has logged."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from xylem.training.plots import apart, loss_curve, loss_curves, matrices, smooth


def log(path, steps, **columns):
    with open(path, "w") as file:
        for step in steps:
            row = {"step": step, "loss": 3 + 5 * math.exp(-step / 40) + 0.1 * math.sin(step)}
            file.write(json.dumps({**row, **{key: value(step) for key, value in columns.items()}}) + "\n")


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def inked(image, colour) -> int:
    return int((np.abs(image - np.array(colour)).sum(-1) < 30).sum())


def test_plots_loss_curve_has_both_panels(tmp_path):
    every = lambda value: lambda step: value if step % 20 == 0 else None  # noqa: E731
    columns = {"tokens": lambda step: step * 9000, "validation_loss": every(3.4)}
    log(tmp_path / "one.jsonl", range(1, 201), **columns)
    log(tmp_path / "two.jsonl", range(1, 201), **columns, validation_bits_per_byte=every(1.9))
    loss_curve(tmp_path / "one.jsonl", tmp_path / "one.png")
    loss_curve(tmp_path / "two.jsonl", tmp_path / "two.png", {"xz": 2.31, "bzip2": 2.3}, title="a run")
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    assert two.shape[1] > 1.7 * one.shape[1] and one.shape[0] > 500
    for image in (one, two):
        assert inked(image, (0x2A, 0x7F, 0x62)) > 500 and inked(image, (0xD1, 0x49, 0x5B)) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "one.png", "two.jsonl", "two.png"]


def test_plots_training_and_validation_show_the_same_figure(tmp_path):
    """A loss with a second objective in it is no neighbour of the validation loss: the tokens' own is drawn."""
    for name, more in {"plain": 0.0, "pairs": 0.7}.items():
        rows = [{"step": i, "loss": 3.0 - 0.01 * i + more, "nll": 3.0 - 0.01 * i} for i in range(1, 30)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        loss_curve(tmp_path / name, tmp_path / f"{name}.png")
    np.testing.assert_array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "pairs.png"))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_plots_loss_curve_of_hardly_any_rows(tmp_path, rows):
    log(tmp_path / "m.jsonl", range(1, 1 + rows), validation_bits_per_byte=lambda step: 2.0)
    loss_curve(tmp_path / "m.jsonl", tmp_path / "m.png", {"xz": 2.0})
    assert pixels(tmp_path / "m.png").std() > 1


def test_plots_a_loss_that_was_not_finite_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2.0}\n')
    loss_curve(tmp_path / "m.jsonl", tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_plots_smoothing_keeps_a_constant_and_follows_a_fall():
    assert smooth([2.0] * 9, 3) == [2.0] * 9
    line = [float(-i) for i in range(30)]
    assert smooth(line, 4)[:20] == pytest.approx(line[:20])
    assert smooth([], 3) == [] and smooth([1.0, 3.0], 0) == [1.0, 3.0]


def test_plots_labels_keep_their_order_and_distance():
    assert apart([2.3, 1.9, 2.29], 0.1) == pytest.approx([2.39, 1.9, 2.29])
    assert apart([1.0, 1.0, 1.0], 0.5) == [1.0, 1.5, 2.0]


def test_plots_tables_are_darker_where_numbers_are_larger(tmp_path):
    rows = {"one": [0.0, 3.0], "other": [1.0, 2.0]}
    matrices({"numbers": rows}, ("a", "b"), tmp_path / "a.png")
    image = pixels(tmp_path / "a.png").sum(-1)
    height, width = image.shape
    corners = [[image[int(height * y), int(width * x)] for x in (0.2, 0.95)] for y in (0.2, 0.8)]
    assert corners[0][0] > corners[1][0] and corners[0][1] < corners[1][1], "each column by itself"


def test_plots_curves_of_losses_end_where_they_end(tmp_path):
    loss_curves({"one": [[0, 4.0], [2000, 3.0]], "other": [[0, 4.0], [2000, 3.5]]}, tmp_path / "a.png")
    loss_curves({"one": [[0, 4.0], [2000, 3.0]], "other": [[0, 4.0], [2000, 3.2]]}, tmp_path / "b.png")
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()
