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

    from xylem.configs.pretrain import COUNTS, RUNS, parse
    from xylem.training.counting_config import CountingConfig

    _, config = parse(arguments, "pretrain.py", str(__doc__), around=lambda run: run, runs={**RUNS, **COUNTS})
    if isinstance(config, CountingConfig):
        from xylem.training.counting import count

        count(config, sys.argv)
    else:
        from xylem.training.loop import pretrain

        pretrain(config, sys.argv)


if __name__ == "__main__":
    launch(main)
