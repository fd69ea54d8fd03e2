"""What the tests measured, as pages: the worst of each, and a grid only where all of it was measured."""

import json

import pytest
from programs import script

from xylem.errors import ConfigError

PAGE = "# Methods\n\n<!-- grid:begin -->\nof an older run\n<!-- grid:end -->\n\nThe end.\n"
KINDS = {"fresh": 1e-5, "merged": 1e-5, "cached": 1e-4, "sharded": 1e-4, "unmerged": 2.0, "saved": 0.0, "still": 0.0}
CELLS = [("lora", "bert"), ("lora", "llama"), ("bitfit", "bert")]


def row(kind, method, family, error, bar, of):
    return {"grid": kind, "method": method, "family": family, "error": error, "bar": bar, "of": of}


def measured():
    """A grid of two methods on two families, one cell of which is empty."""
    rows = [row(kind, *cell, 0.0, bar, len(CELLS)) for kind, bar in KINDS.items() for cell in CELLS]
    rows += [row("merged", "lora", "llama", 3.2e-6, 1e-5, 3), row("unmerged", "lora", "bert", 1.5, 2.0, 3)]
    rows += [row("cached", "bitfit", "bert", 4e-5, 2e-4, 3), row("empty", "bitfit", "llama", "no biases", None, 1)]
    return rows


def proof(error, bar, **more):
    return {"row": "LoRA", "oracle": "peft", "error": error, "bar": bar, "seed": 1, "mutation": "scale"} | more


@pytest.fixture
def write(tmp_path):
    """Runs the script on rows; gives the two pages."""

    def written(rows, page=PAGE):
        (tmp_path / "proofs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        (tmp_path / "peft.md").write_text(page)
        script("proofs")([str(tmp_path / name) for name in ("proofs.jsonl", "proofs.md", "peft.md")])
        return (tmp_path / "proofs.md").read_text(), (tmp_path / "peft.md").read_text()

    return written


def test_of_several_comparisons_the_nearest_to_its_bar_is_shown(write):
    proofs, _ = write([proof(1e-6, 1e-5, seed=7), proof(5e-6, 1e-5, seed=8), proof(9e-6, 1e-3, seed=9), *measured()])
    assert proofs.count("| LoRA |") == 1 and "| LoRA | peft | 5e-06 | 1e-05 | scale | 8 |" in proofs


def test_the_grid_shows_each_cell_and_each_kind_at_its_worst(write, capsys):
    _, page = write(measured())
    assert page.startswith("# Methods\n") and page.endswith("<!-- grid:end -->\n\nThe end.\n")
    assert "older" not in page and "a grid of 4 cells" in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    assert lines[2:4] == [["bitfit", "4e-05", "", "", "", "none (1)", ""], ["lora", "0", "", "", "", "3e-06", ""]]
    assert "(1) no biases" in page
    assert lines[6:] == [
        ["bitfit", "0", "0", "4e-05", "0", "0", "0", "0"],
        ["lora", "0", "3e-06", "0", "0", "1.5", "0", "0"],
        ["*allowed*", "1e-05", "1e-05", "1e-04 to 2e-04", "1e-04", "2", "0", "0"],
    ]


def test_a_part_of_the_suite_leaves_the_grid_as_it_is(write, capsys):
    rows = [one for one in measured() if one["grid"] != "sharded" and one["family"] != "llama"]
    _, page = write(rows)
    told = capsys.readouterr().out
    assert page == PAGE
    assert "measured a part of it" in told and "sharded in 0 of ? cells" in told and "fresh in 2 of 3 cells" in told


@pytest.mark.parametrize("page", ["# Nothing\n", PAGE + PAGE, PAGE.replace("grid:end", "grid:begin")])
def test_a_page_without_the_comments_is_told_and_kept(write, page, capsys):
    _, kept = write(measured(), page)
    assert kept == page and "grid:begin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"), [(["one"], "give the proofs' file"), (["no.jsonl", "a.md"], "make test")]
)
def test_proofs_mistakes_are_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        script("proofs")(arguments)
