"""Gather what the tests proved into a page: one line a technique.

python scripts/proofs.py PROOFS.jsonl docs/proofs.md
"""

from __future__ import annotations

import json
from pathlib import Path

from xylem.errors import ConfigError
from xylem.launch import launch

HEAD = """# Proofs

What each part was compared with, how close it came, and which deliberate fault the same test showed it would catch.
Written by `make check` from the tests of that run; configurations and seeds are drawn anew each time, so the errors
differ from run to run and the bars do not. `XYLEM_TEST_SEED=SEED` repeats one.

| technique | compared with | error | allowed | fault caught | seed |
| --- | --- | --- | --- | --- | --- |
"""


def main(arguments: list[str]) -> None:
    """Of several comparisons of one technique with one oracle, the page shows the largest error."""
    if len(arguments) != 2:
        raise ConfigError("arguments", " ".join(arguments), "give the proofs' file and the page to write")
    source, page = map(Path, arguments)
    if not source.is_file():
        raise ConfigError("PROOFS.jsonl", str(source), "run the tests first: make test")
    share = lambda row: row["error"] / (row["bar"] or 1.0)  # noqa: E731
    worst: dict[tuple[str, str], dict] = {}
    for line in source.read_text().splitlines():
        row = json.loads(line)
        key = (row["row"], row["oracle"])
        if key not in worst or share(row) >= share(worst[key]):
            worst[key] = row
    rows = [
        "| {row} | {oracle} | {error:.2g} | {bar:.2g} | {mutation} | {seed} |".format(**row)
        for _, row in sorted(worst.items())
    ]
    page.write_text(HEAD + "\n".join(rows) + "\n")
    print(f"{page}: {len(rows)} proofs")


if __name__ == "__main__":
    launch(main)
