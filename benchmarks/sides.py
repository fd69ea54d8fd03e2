"""Sides that take turns: one process each, asked for a round of steps at a time, and the figures of their rounds.

What the scripts share that compare steps. Such a script runs itself once more for every side (``--worker NAME``), and
that process answers through ``answer``; the parent calls ``measure`` and ``report``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peers

from xylem.launch import ALLOCATOR

TOLERANCE = 1e-3  # relative, between the losses of two sides at the same step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of this kind is asked."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-per-round", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the counted rounds")
    parser.add_argument(
        "--pause", type=float, default=0.5, help="seconds between two turns, for spinning threads to rest"
    )
    parser.add_argument("--threads", type=int, default=2, help="of each side, on a CPU")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="gpu: the first one, by CUDA")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of products; weights stay in float32"
    )
    parser.add_argument(
        "--allocator", choices=["ours", "default"], default="ours", help="glibc settings of all sides (xylem/launch.py)"
    )
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    for hidden in ("--worker", "--weights", "--export"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)


# --- one side's process -----------------------------------------------------------------------------------------------


def answer(make: Callable[[], Callable[[int], Any]]) -> None:
    """Answer each line of stdin, a number of steps, with one JSON line: seconds, CPU seconds, losses, peak memory.

    ``make()`` gives ``step(index) -> loss``, or what else two sides are compared by; what it takes is part of the time
    to start.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    begun, count = time.perf_counter(), 0
    step = make()
    busy = time.perf_counter() - begun  # started early, a side waits for its turn
    for line in sys.stdin:
        seconds, cpu, losses = time.perf_counter(), time.process_time(), []
        for _ in range(int(line)):
            losses.append(step(count))
            count += 1
        reply = {"seconds": time.perf_counter() - seconds, "cpu": time.process_time() - cpu, "losses": losses}
        reply["memory"] = _peak_memory()
        busy += reply["seconds"]
        reply["since_start"] = busy
        print(json.dumps(reply), file=replies)


def _peak_memory() -> int:
    """The most bytes that this process held: of the GPU's where it computes there (as its library counts), else
    resident."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if "torch" in sys.modules:
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


class Side:
    """A worker seen from the parent; its log is a file, shown when it dies."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, *extra: str):
        self.name, self.log = name, folder / f"{name.replace(':', '-')}.log"
        command = [sys.executable, sys.argv[0], "--worker", name, "--config", args.config]
        command += ["--device", args.device, "--dtype", args.dtype]
        command += ["--weights", str(folder / "hf"), "--threads", str(args.threads), *extra]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if args.device == "gpu":
            # Sides share the GPU's memory. float32 means float32 on all sides, where jax by itself rounds the factors.
            env |= {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            env |= {"JAX_DEFAULT_MATMUL_PRECISION": "float32"} if args.dtype == "float32" else {}
        else:
            env |= {"JAX_PLATFORMS": "cpu"} | {
                f"{x}_NUM_THREADS": str(args.threads) for x in ("OMP", "MKL", "OPENBLAS")
            }
            env |= ALLOCATOR if args.allocator == "ours" else {}
            # XLA sizes its pool by the CPUs this process may run on; the others obey the variables.
            cpus = sorted(os.sched_getaffinity(0))[: args.threads]
            command = ["taskset", "-c", ",".join(map(str, cpus)), *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), env=env, text=True
        )

    def ask(self, steps: int) -> dict:
        """One round; raises RuntimeError with the end of the log when the worker died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(steps, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} died:\n" + self.log.read_text()[-1500:])
        return json.loads(line)

    def close(self) -> None:
        """End the worker and wait for it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


# --- the comparison ---------------------------------------------------------------------------------------------------


def measure(names: list[str], args: argparse.Namespace, *extra: str) -> dict[str, list[dict]]:
    """Name of a side -> its rounds, the first of them the warm-up. ``extra`` arguments go to every worker."""
    if args.device == "gpu" and shutil.which("nvidia-smi") is None:
        raise SystemExit("error: --device gpu: there is no NVIDIA driver here (no nvidia-smi); leave the flag out")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export = Side("xylem", args, folder, "--export", str(folder / "hf"))
        if export.process.wait():
            raise SystemExit("error: the first weights were not written:\n" + export.log.read_text()[-1500:])
        sides, rounds = {}, {}
        names = [*names, "probe"]
        # A machine with a GPU has cores enough for all to start at once; elsewhere each starts when its turn has come.
        started = {name: Side(name, args, folder, *extra) for name in names if args.device == "gpu"}
        for name in names:
            side = started.get(name) or Side(name, args, folder, *extra)
            try:
                rounds[name] = [side.ask(args.warmup)]
                sides[name] = side
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr)
        for number in range(args.rounds):
            order = list(sides)
            random.Random(number).shuffle(order)
            for name in order:
                time.sleep(args.pause)
                rounds[name].append(sides[name].ask(args.steps_per_round))
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        for side in sides.values():
            side.close()
    return rounds


def where(args: argparse.Namespace) -> str:
    """What the sides computed on and in, as a report says it."""
    return f"{args.dtype} on a GPU" if args.device == "gpu" else f"{args.dtype} on {args.threads} CPU threads"


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least, greatest."""
    return statistics.median(values), min(values), max(values)


def report(
    workload: Any,
    args: argparse.Namespace,
    rounds: dict[str, list[dict]],
    alike: Callable[[str, str], bool] = lambda us, peer: True,
) -> dict[str, dict]:
    """Print and write the figures of each side from its counted rounds, and the ratios of ours to the fastest peer.

    Returns the figures by side.

    ``workload`` is a dataclass with ``tokens`` a step and ``flops`` a token; a peer ``alike`` one of ours does the same
    work. Exits with 1 where the sides' losses show that they did not compute the same.
    """
    steps, probe = args.steps_per_round, rounds.pop("probe")
    peak, low, high = spread([2 * steps * peers.PROBE[args.device] ** 3 / r["seconds"] / 1e9 for r in probe[1:]])
    print(f"\n{args.config}: {asdict(workload)}")
    print(f"useful FLOPs a token: {workload.flops / 1e6:.1f} M; {workload.tokens} tokens a step; {where(args)}")
    print(f"matrix-product peak in this run: {peak:.0f} ({low:.0f}-{high:.0f}) GFLOP/s\n")
    row = "{:<18} {:>22} {:>8} {:>8} {:>9} {:>8} {:>9}".format
    print(row("side", "tokens/s (min-max)", "GFLOP/s", "of peak", "CPU s/st", "peak GB", "start s"))
    figures = {}
    for name, counted in rounds.items():
        speed = spread([workload.tokens * steps / r["seconds"] for r in counted[1:]])
        flops = speed[0] * workload.flops / 1e9
        figures[name] = {
            "tokens_per_second": speed,
            "gflops": flops,
            "of_peak": flops / peak,
            "cpu_seconds_per_step": statistics.median(r["cpu"] / steps for r in counted[1:]),
            "peak_bytes": counted[-1]["memory"],
            "start_seconds": counted[0]["since_start"],
            "losses": [loss for r in counted for loss in r["losses"]],
        }
        f = figures[name]
        rate = f"{speed[0]:.0f} ({speed[1]:.0f}-{speed[2]:.0f})"
        last = f"{f['cpu_seconds_per_step']:.3f}", f"{f['peak_bytes'] / 1e9:.2f}", f"{f['start_seconds']:.1f}"
        print(row(name, rate, f"{flops:.0f}", f"{flops / peak:.0%}", *last))
    ours = [name for name in figures if name.startswith("xylem")]
    theirs = [name for name in figures if name not in ours]
    pairs = [(us, [peer for peer in theirs if alike(us, peer)]) for us in ours] if theirs else [(ours[0], ours[1:])]
    compared = [ratios(us, others, figures, rounds) for us, others in pairs if others]
    groups = [[us, *others] for us, others in pairs]
    losses = [_losses({name: figures[name] for name in group}) for group in groups]
    result = {"config": args.config, "workload": asdict(workload), "flops_per_token": workload.flops, "probe": peak}
    result |= {"sides": figures, "rounds": rounds, "ratios": compared, "losses": losses}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    if not all(each["agree"] for each in losses):
        sys.exit(1)
    return figures


def ratios(us: str, others: list[str], figures: dict[str, dict], rounds: dict[str, list[dict]]) -> dict:
    """One of ours to the fastest of the others; printed too."""
    peer = max(others, key=lambda name: figures[name]["tokens_per_second"][0])
    pairs = zip(rounds[us][1:], rounds[peer][1:], strict=True)
    result = {
        "side": us,
        "peer": peer,
        "speed_ratio": figures[us]["tokens_per_second"][0] / figures[peer]["tokens_per_second"][0],
        "speed_ratio_by_round": spread([b["seconds"] / a["seconds"] for a, b in pairs]),
        "cpu_ratio": figures[us]["cpu_seconds_per_step"] / figures[peer]["cpu_seconds_per_step"],
        "memory_ratio": figures[us]["peak_bytes"] / figures[peer]["peak_bytes"],
    }
    middle, low, high = result["speed_ratio_by_round"]
    print(f"\n{us} to {peer}, the fastest peer: {result['speed_ratio']:.3f}x the speed by medians")
    print(f"  round by round {middle:.3f} ({low:.3f}-{high:.3f}); {result['cpu_ratio']:.3f}x the CPU time, ", end="")
    print(f"{result['memory_ratio']:.3f}x the memory")
    return result


def _losses(figures: dict[str, dict]) -> dict:
    """Whether these sides saw the same losses, and they fell; printed too."""
    steps = list(zip(*(f["losses"] for f in figures.values()), strict=True))
    apart = [(max(losses) - min(losses)) / abs(losses[0]) for losses in steps]
    fell = f"{steps[0][0]:.4f} -> {steps[-1][0]:.4f}"
    print(f"losses of {', '.join(figures)}: {fell}; they differ by {apart[0]:.1e} at first, {max(apart):.1e} at most")
    agree = apart[0] <= TOLERANCE and steps[-1][0] < steps[0][0]
    return {"sides": list(figures), "first": apart[0], "greatest": max(apart), "agree": agree}
