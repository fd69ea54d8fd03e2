"""Pretrain a language model on text.

    python scripts/pretrain.py [PRESET] --steps N --seed S --run-dir DIR ...

PRESET names a run of xylem/configs/pretrain.py ("default" where none is given); every field of it is a flag. The same
command on the same folder resumes.
"""

from __future__ import annotations

from xylem.launch import launch


def main(arguments: list[str]) -> None:
    """Parse, call."""
    import sys

    import tyro

    from xylem.configs.pretrain import RUNS
    from xylem.errors import ConfigError
    from xylem.training.config import RunConfig

    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    name = named[0] if named else "default"
    if name not in RUNS:
        raise ConfigError("PRESET", name, f"it must be one of {', '.join(RUNS)}", RUNS)
    description = f"{__doc__}\nPresets: {', '.join(RUNS)}."
    config = tyro.cli(
        RunConfig,
        prog="pretrain.py [PRESET]",
        description=description,
        default=RUNS[name](),
        args=arguments[len(named) :],
        config=(tyro.conf.AvoidSubcommands,),
    )

    from xylem.training.loop import pretrain

    pretrain(config, sys.argv)


if __name__ == "__main__":
    launch(main)
