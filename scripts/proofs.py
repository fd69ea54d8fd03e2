"""Gather what the tests proved into pages: one line a technique, and what was measured of every cell of a grid.

    python scripts/proofs.py PROOFS.jsonl docs/proofs.md docs/peft.md

The last page is left out, or has the comments grid:begin and grid:end: what is between them becomes the grid, where the
tests measured the whole of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xylem.errors import ConfigError
from xylem.launch import launch

HEAD = """# Proofs

What each part was compared with, how close it came, and which deliberate fault the same test showed it would catch.
Written by `make check` from the tests of that run; configurations and seeds are drawn anew each time, so the errors
differ from run to run and the bars do not. `XYLEM_TEST_SEED=SEED` repeats one.

| technique | compared with | error | allowed | fault caught | seed |
| --- | --- | --- | --- | --- | --- |
"""
FAMILIES = {"bert": "BERT", "t5": "T5", "bart": "BART", "gpt2": "GPT-2", "llama": "LLaMA", "mamba": "Mamba"}
# Each kind of measurement, and what its column says. Those of RELATIVE are differences of logits over their largest.
KINDS = {
    "fresh": "fresh = base",
    "merged": "merged = grafted",
    "cached": "cached = whole",
    "sharded": "sharded = whole",
    "unmerged": "unmerged = base, ulp",
    "saved": "loaded = saved",
    "still": "learn and stand still",
}
RELATIVE = ("fresh", "merged", "cached", "sharded")
GRID = "grid"

Row = Mapping[str, Any]


def main(arguments: list[str]) -> None:
    """Of several comparisons of one technique with one oracle, the page shows the largest error."""
    if len(arguments) not in (2, 3):
        raise ConfigError(
            "arguments", " ".join(arguments), "give the proofs' file, the page of proofs, that of the grid"
        )
    source, page, *grid = map(Path, arguments)
    if not source.is_file():
        raise ConfigError("PROOFS.jsonl", str(source), "run the tests first: make test")
    found = [json.loads(line) for line in source.read_text().splitlines()]
    lines = proof_lines([row for row in found if GRID not in row])
    page.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{page}: {len(lines)} proofs")
    for one in grid:
        write_grid(one, [row for row in found if GRID in row])


def proof_lines(rows: Sequence[Row]) -> list[str]:
    """A line of the table for each technique and oracle."""
    share = lambda row: row["error"] / (row["bar"] or 1.0)  # noqa: E731
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["row"], row["oracle"])
        if key not in worst or share(row) >= share(worst[key]):
            worst[key] = row
    line = "| {row} | {oracle} | {error:.2g} | {bar:.2g} | {mutation} | {seed} |"
    return [line.format(**row) for _, row in sorted(worst.items())]


def write_grid(page: Path, rows: Sequence[Row]) -> None:
    """The grid into its page, or why that stays as it is."""
    from xylem.files import replace_section, section

    try:
        section(page, GRID)
    except ConfigError as error:
        return print(f"the grid is written nowhere: {error}")
    if lacks := missing(rows):
        return print(f"{page}: its grid stays as it is, for these tests measured a part of it: {lacks}")
    replace_section(page, GRID, grid_lines(rows))
    print(f"{page}: a grid of {len({(row['method'], row['family']) for row in rows})} cells")


def missing(rows: Sequence[Row]) -> str:
    """What a part of the suite has not measured, in words; nothing where it was all of it."""
    lacks = []
    for kind in (*KINDS, "empty"):
        own = [row for row in rows if row[GRID] == kind]
        cells, wanted = len({(row["method"], row["family"]) for row in own}), max((row["of"] for row in own), default=0)
        if not own or cells < wanted:
            lacks.append(f"{kind} in {cells} of {wanted or '?'} cells")
    return ", ".join(lacks)


def grid_lines(rows: Sequence[Row]) -> str:
    """Two tables: of every cell the largest difference of logits; of every method the largest of each kind."""
    methods = sorted({row["method"] for row in rows})
    empty = {(row["method"], row["family"]): str(row["error"]) for row in rows if row[GRID] == "empty"}
    measured = [row for row in rows if row[GRID] in KINDS]
    footnotes = sorted(set(empty.values()))
    lines = table(["largest difference", *FAMILIES.values()])
    for method in methods:
        cells = []
        for family in FAMILIES:
            errors = [row for row in measured if (row["method"], row["family"]) == (method, family)]
            reason = empty.get((method, family))
            shown = f"none ({footnotes.index(reason) + 1})" if reason else worst(errors, RELATIVE)
            cells.append(shown)
        lines.append(line_of([method, *cells]))
    lines += ["", *(f"({number}) {reason}" for number, reason in enumerate(footnotes, 1)), ""]
    lines += table(["largest over families", *KINDS.values()])
    for method in methods:
        errors = [row for row in measured if row["method"] == method]
        lines.append(line_of([method, *(worst(errors, (kind,)) for kind in KINDS)]))
    bars = [{row["bar"] for row in measured if row[GRID] == kind} for kind in KINDS]
    allowed = [f"{min(bar):.0e} to {max(bar):.0e}" if len(bar) > 1 else number(max(bar)) for bar in bars]
    return "\n".join([*lines, line_of(["*allowed*", *allowed])])


def worst(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    """The largest error of some kinds; nothing where none was measured."""
    errors = [row["error"] for row in rows if row[GRID] in kinds]
    return number(max(errors)) if errors else ""


def number(error: float) -> str:
    """A short form: 0, 1.5, 3e-07."""
    return f"{error:.2g}" if error == 0 or error >= 0.1 else f"{error:.0e}"


def table(headings: Sequence[str]) -> list[str]:
    """The first two lines of a table: names on the left, numbers on the right."""
    return [line_of(headings), line_of(["---", *["---:"] * (len(headings) - 1)])]


def line_of(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    launch(main)
