"""From the start of `scripts/pretrain.py` to its first step: the default run as a user starts it.

    python benchmarks/start.py --rounds 5 --out start.json

Each round starts the script twice: with an empty compile cache, then with what that start compiled. Text and tokens are
prepared beforehand. The clock runs from the process's birth to the line of its first step, which is printed when that
step is done: imports, the start anew with allocator settings, opening the data, compiling and one step are all in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain.py"
TARGETS = {"cold": 20.0, "cached": 8.0}  # seconds


def first_step(cache: Path, run_dir: Path) -> float:
    """Seconds from the start of a process to the line of its first step; the process is then killed."""
    # A step that something happens after is shown at once; every other one while the next is running.
    flags = ["--log-every", "1", "--save-every", "1", "--run-dir", str(run_dir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags], env={**os.environ, "XYLEM_CACHE": str(cache)}, **pipes
    ) as process:
        try:
            for line in process.stdout or ():
                if line.startswith("step"):
                    return time.perf_counter() - start
            raise SystemExit(f"the run ended before its first step:\n{process.communicate()[1][-2000:]}")
        finally:
            process.kill()


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each start, cold and cached; a first round, which fills the system's file cache, is left out."""
    from xylem.configs.pretrain import default
    from xylem.data import pipeline
    from xylem.data.config import cache_root

    pipeline.prepare(default().data)
    seconds: dict[str, list[float]] = {kind: [] for kind in TARGETS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        cache.mkdir()
        for prepared in cache_root().iterdir():
            if prepared.name != "xla":
                (cache / prepared.name).symlink_to(prepared)
        for turn in range(rounds + 1):
            shutil.rmtree(cache / "xla", ignore_errors=True)
            for kind, taken in seconds.items():
                taken.append(first_step(cache, folder / f"{kind}-{turn}"))
                print(f"round {turn}, {kind}: {taken[-1]:.1f} s", flush=True)
    return {kind: taken[1:] for kind, taken in seconds.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write every measurement here, as JSON")
    args = parser.parse_args()
    seconds = measure(args.rounds)
    for kind, taken in seconds.items():
        spread = f"median {statistics.median(taken):.1f} s, {min(taken):.1f} to {max(taken):.1f}"
        print(f"{kind:6} {spread} (target: under {TARGETS[kind]:.0f} s)")
    if args.out:
        args.out.write_text(json.dumps(seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
