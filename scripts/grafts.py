"""Draw what each method of xylem/peft makes of a parameter tree: the pictures of docs/peft.md.

python scripts/grafts.py --out docs/figures
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from xylem.launch import launch


@dataclass(frozen=True)
class Arguments:
    """Where to.

    Attributes:
        out: the folder that the pictures go to.
    """

    out: str = "docs/figures"


def main(arguments: list[str]) -> None:
    """Parse, draw, print."""
    parsed = tyro.cli(Arguments, prog="grafts.py", description=__doc__, args=arguments)

    from pathlib import Path

    from xylem.pictures.grafts import PICTURES

    folder = Path(parsed.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in PICTURES.items():
        path = folder / f"{name}.png"
        made().draw(path)
        print(f"{path}  {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    launch(main)
