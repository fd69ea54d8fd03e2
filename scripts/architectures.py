"""Draw what the models are, from their code.

    python scripts/architectures.py --out docs/figures                    # the pictures of docs/architectures.md
    python scripts/architectures.py PRESET --model.norm-position post     # the model of any run, as flags change it

PRESET is a run of xylem/configs/pretrain.py. Nothing is trained and no weight is made: a picture shows the program that
jax traces of the model (xylem/pictures/flow.py), so a preset of any size is drawn in a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from xylem.launch import launch
from xylem.training.config import RunConfig


@dataclass(frozen=True)
class Arguments:
    """What to draw.

    Attributes:
        only: names of pictures; all of them where none is given.
        out: the folder that they go to.
    """

    only: tuple[str, ...] = ()
    out: str = "docs/figures"


@dataclass(frozen=True)
class Drawing:
    """A run's model.

    Attributes:
        out: the PNG.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: str = "runs/architecture.png"


def main(arguments: list[str]) -> None:
    """Parse, draw, print."""
    from xylem.configs.pretrain import parse

    if arguments and not arguments[0].startswith("-"):
        name, drawing = parse(arguments, "architectures.py", str(__doc__), around=Drawing)
        draw_model(name, drawing)
        return
    parsed = tyro.cli(Arguments, prog="architectures.py [PRESET]", description=__doc__, args=arguments)
    draw_all(parsed)


def draw_model(name: str, drawing: Drawing) -> None:
    """The picture of one model."""
    from pathlib import Path

    from xylem.pictures.catalogue import Flows
    from xylem.pictures.flow import of_model

    path = Path(drawing.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    Flows((of_model(drawing.run.model, name),)).draw(path)
    print(path)


def draw_all(parsed: Arguments) -> None:
    """The pictures of the catalogue."""
    from pathlib import Path

    from xylem.errors import ConfigError
    from xylem.pictures.catalogue import PICTURES

    for name in parsed.only:
        if name not in PICTURES:
            raise ConfigError("only", name, f"it must be one of {', '.join(PICTURES)}", PICTURES)
    folder = Path(parsed.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in parsed.only or PICTURES:
        path = folder / f"{name}.png"
        PICTURES[name]().draw(path)
        print(f"{path}  {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    launch(main)
