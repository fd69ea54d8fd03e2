"""Ask, without a TPU, whether a run fits one: compile its training step for a topology and print the bytes a chip.

    python scripts/plan.py [PRESET] --topology v5e:2x4 --mesh.fsdp 8 ...

PRESET and all other flags are those of scripts/pretrain.py. Needs libtpu: pip install 'xylem-lm[plan]'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from xylem.launch import launch
from xylem.training.config import RunConfig


@dataclass(frozen=True)
class Arguments:
    """What to compile, and for which chips."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    topology: str = "v5e:2x4"


def main(arguments: list[str]) -> None:
    """Parse, call, print."""
    from xylem.configs.pretrain import parse

    name, parsed = parse(arguments, "plan.py", str(__doc__), around=Arguments)

    from xylem.training.plan import GIB, plan

    found = plan(parsed.run, parsed.topology)
    print(f"{name} on {parsed.topology}: {found.chips} x {found.kind}; GiB a chip")
    sizes = ("state", "arguments", "outputs", "aliased", "temporaries", "code", "total")
    for size in sizes:
        print(f"  {size:<12}{getattr(found, size) / GIB:8.3f}")
    print(f"  {'memory':<12}" + ("  unknown" if found.hbm is None else f"{found.hbm / GIB:8.3f}"))
    print(f"collectives: {', '.join(f'{name} {count}' for name, count in sorted(found.collectives.items())) or 'none'}")
    print({True: "fits", False: "does NOT fit", None: "fit unknown"}[found.fits])


if __name__ == "__main__":
    launch(main)
