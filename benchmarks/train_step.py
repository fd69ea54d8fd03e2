"""Full training step (forward, backward, AdamW) beside the peers: speed, CPU time and memory, in one run.

    python benchmarks/train_step.py --config gpt_char --peer DIR     # DIR: a checkout of nanoGPT
    python benchmarks/train_step.py --config llama --out llama.json
    python benchmarks/train_step.py --config gpt_char --sides xylem xylem:scan xylem:plain

Each side is a process of its own with the same allocator settings, threads, first weights, token batches and AdamW
constants. The parent asks one side at a time for a round of steps, in a new order every round, so that all see the same
machine; the others sleep meanwhile. A process that only multiplies matrices takes its turn too: the share of the peak
is of that. float32, no dropout, no clipping. All losses are compared step by step: who computes something else shows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import peers

from xylem.launch import ALLOCATOR

TOLERANCE = 1e-3  # relative, between the losses of two sides at the same step


@dataclass(frozen=True)
class Workload:
    """One network and its batch."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    ff: int
    vocab: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.length * self.batch

    @property
    def flops(self) -> float:
        """Useful training FLOPs a token: 6 for each weight in a product, 6 L T D for the causal half of attention."""
        kv = self.width * self.kv_heads // self.heads
        matrices = 3 if self.family == "llama" else 2
        layer = 2 * self.width * (self.width + kv) + matrices * self.width * self.ff
        return 6.0 * (self.layers * layer + self.vocab * self.width) + 6.0 * self.layers * self.length * self.width


WORKLOADS = {
    "gpt_char": Workload("gpt", 6, 384, 6, 6, 1536, 256, 256, 16),
    "gpt_bpe": Workload("gpt", 6, 384, 6, 6, 1536, 50304, 256, 16),
    "llama": Workload("llama", 8, 512, 8, 4, 1408, 8192, 512, 8),
    "tiny_gpt": Workload("gpt", 2, 32, 2, 2, 128, 96, 16, 4),  # the last two show that the script works
    "tiny_llama": Workload("llama", 2, 32, 4, 2, 48, 96, 16, 4),
}
VARIANTS = {  # of ours: Compute.layers, Compute.kernels
    "auto": ("auto", "auto"),
    "scan": ("scan", "auto"),
    "unroll": ("unroll", "auto"),
    "plain": ("auto", "plain"),
    "plain-scan": ("scan", "plain"),
}


# --- ours -------------------------------------------------------------------------------------------------------------


def our_config(workload: Workload, variant: str):
    """The public config of the network; with the exact GELU, because nanoGPT has it."""
    from dataclasses import replace

    from xylem.models import gpt, llama
    from xylem.models.config import Compute

    layers, kernels = VARIANTS[variant]
    w = workload
    if w.family == "gpt":
        config = replace(gpt.gpt(w.layers, w.width, w.heads, w.vocab, w.length), activation="gelu")
    else:
        config = llama.llama(w.layers, w.width, w.heads, w.kv_heads, w.ff, w.vocab, w.length, 1e4, 1e-5)
    return replace(config, compute=Compute(layers=layers, kernels=kernels))


def our_step(workload: Workload, variant: str) -> tuple[Callable[[int], float], Callable[[str], None]]:
    """``step(i) -> loss`` through the public path, and ``save(folder)`` for the first weights."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from xylem.launch import settle_jax
    from xylem.models import build, hub
    from xylem.sharding import make_mesh
    from xylem.training.config import ObjectiveConfig, OptimizerConfig
    from xylem.training.objectives import causal_lm
    from xylem.training.optimizers import make_optimizer
    from xylem.training.state import abstract_state, make_state, new_state
    from xylem.training.step import train_step

    settle_jax()
    config = our_config(workload, variant)
    module, mesh = build(config), make_mesh(devices=jax.devices()[:1])
    constant = {"schedule": "constant", "warmup_steps": 0, "clip_norm": None}
    optimizer = make_optimizer(OptimizerConfig(**constant, **peers.ADAMW), steps=10**6)

    def create():
        params = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return new_state(params, optimizer, seed=0)

    with jax.set_mesh(mesh):
        abstract = abstract_state(create, mesh)
        state = make_state(create, abstract)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    loss = partial(causal_lm, module, ObjectiveConfig())
    advance = jax.jit(
        partial(train_step, loss=loss, optimizer=optimizer), donate_argnums=0, out_shardings=(where, None)
    )
    weights = jnp.ones((workload.batch, workload.length))
    data = [
        {"tokens": jnp.asarray(tokens, jnp.int32), "labels": jnp.asarray(labels, jnp.int32), "weights": weights}
        for tokens, labels in peers.batches(workload.vocab, workload.batch, workload.length)
    ]

    def step(index: int) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = advance(state, data[index % len(data)])
        return float(metrics["loss"])

    return step, lambda folder: hub.save(folder, config, state.params)


# --- one side's process -----------------------------------------------------------------------------------------------


def worker(side: str, args: argparse.Namespace) -> None:
    """Answer each line of stdin, a number of steps, with one JSON line: seconds, CPU seconds, losses, peak memory."""
    import resource

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    workload, (kind, _, variant) = WORKLOADS[args.config], side.partition(":")
    begun = time.perf_counter()
    if kind == "xylem":
        step, save = our_step(workload, variant or "auto")
        if args.export:
            save(args.export)
            return
    else:
        step = peers.make(kind, workload, args.weights, args.peer, args.threads)
    count = 0
    for line in sys.stdin:
        seconds, cpu, losses = time.perf_counter(), time.process_time(), []
        for _ in range(int(line)):
            losses.append(step(count))
            count += 1
        reply = {"seconds": time.perf_counter() - seconds, "cpu": time.process_time() - cpu, "losses": losses}
        reply["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        reply["since_start"] = time.perf_counter() - begun
        print(json.dumps(reply), file=replies)


class Side:
    """A worker seen from the parent; its log is a file, shown when it dies."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, *extra: str):
        self.name, self.log = name, folder / f"{name.replace(':', '-')}.log"
        command = [sys.executable, __file__, "--worker", name, "--config", args.config, "--weights", str(folder / "hf")]
        command += ["--threads", str(args.threads), *(["--peer", args.peer] if args.peer else []), *extra]
        threads = {f"{x}_NUM_THREADS": str(args.threads) for x in ("OMP", "MKL", "OPENBLAS")}
        # XLA sizes its pool by the CPUs this process may run on; the others obey the variables.
        cpus = sorted(os.sched_getaffinity(0))[: args.threads]
        env = {**os.environ, **threads, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        env |= ALLOCATOR if args.allocator == "ours" else {}
        self.process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cpus)), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=env,
            text=True,
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


def default_sides(workload: Workload, args: argparse.Namespace) -> list[str]:
    """Ours, and the peers there are for this network."""
    theirs = ["nanogpt", "nanogpt-fused"] if workload.family == "gpt" and args.peer else ["hf", "hf-compile"]
    return [f"xylem:{args.ours}" if args.ours else "xylem", *theirs]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """Name of a side -> its rounds, the first of them the warm-up."""
    names = args.sides or default_sides(WORKLOADS[args.config], args)
    export = Side("xylem", args, folder, "--export", str(folder / "hf"))
    if export.process.wait():
        raise RuntimeError("the first weights were not written:\n" + export.log.read_text()[-1500:])
    sides, rounds = {}, {}
    for name in [*names, "probe"]:
        side = Side(name, args, folder)
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


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least, greatest."""
    return statistics.median(values), min(values), max(values)


def report(args: argparse.Namespace, rounds: dict[str, list[dict]]) -> dict:
    """Figures of each side from its counted rounds, and the ratio of ours to the fastest peer."""
    workload, steps = WORKLOADS[args.config], args.steps_per_round
    probe = rounds.pop("probe")
    peak, low, high = spread([2 * steps * peers.PROBE**3 / r["seconds"] / 1e9 for r in probe[1:]])
    print(f"\n{args.config}: {asdict(workload)}")
    print(
        f"useful FLOPs a token: {workload.flops / 1e6:.1f} M; {workload.tokens} tokens a step; threads: {args.threads}"
    )
    print(f"matrix-product peak in this run: {peak:.0f} ({low:.0f}-{high:.0f}) GFLOP/s\n")
    row = "{:<18} {:>22} {:>8} {:>8} {:>9} {:>8} {:>9}".format
    print(row("side", "tokens/s (min-max)", "GFLOP/s", "of peak", "CPU s/st", "RSS GB", "start s"))
    figures = {}
    for name, counted in rounds.items():
        speed = spread([workload.tokens * steps / r["seconds"] for r in counted[1:]])
        flops = speed[0] * workload.flops / 1e9
        figures[name] = {
            "tokens_per_second": speed,
            "gflops": flops,
            "of_peak": flops / peak,
            "cpu_seconds_per_step": statistics.median(r["cpu"] / steps for r in counted[1:]),
            "peak_rss_bytes": counted[-1]["rss"],
            "start_seconds": counted[0]["since_start"],
            "losses": [loss for r in counted for loss in r["losses"]],
        }
        f = figures[name]
        rate = f"{speed[0]:.0f} ({speed[1]:.0f}-{speed[2]:.0f})"
        last = f"{f['cpu_seconds_per_step']:.3f}", f"{f['peak_rss_bytes'] / 1e9:.2f}", f"{f['start_seconds']:.1f}"
        print(row(name, rate, f"{flops:.0f}", f"{flops / peak:.0%}", *last))
    result = {"config": args.config, "workload": asdict(workload), "flops_per_token": workload.flops, "probe": peak}
    return {**result, "sides": figures, "rounds": rounds, **compare(figures, rounds)}


def compare(figures: dict[str, dict], rounds: dict[str, list[dict]]) -> dict:
    """Ratios of the first of ours to the fastest peer, and whether all sides saw the same losses; printed too."""
    ours = [name for name in figures if name.startswith("xylem")]
    theirs = [name for name in figures if name not in ours] or ours[1:]
    result: dict = {}
    if ours and theirs:
        us, peer = ours[0], max(theirs, key=lambda name: figures[name]["tokens_per_second"][0])
        pairs = zip(rounds[us][1:], rounds[peer][1:], strict=True)
        result = {
            "peer": peer,
            "speed_ratio": figures[us]["tokens_per_second"][0] / figures[peer]["tokens_per_second"][0],
            "speed_ratio_by_round": spread([b["seconds"] / a["seconds"] for a, b in pairs]),
            "cpu_ratio": figures[us]["cpu_seconds_per_step"] / figures[peer]["cpu_seconds_per_step"],
            "memory_ratio": figures[us]["peak_rss_bytes"] / figures[peer]["peak_rss_bytes"],
        }
        middle, low, high = result["speed_ratio_by_round"]
        print(f"\n{us} to {peer}, the fastest peer: {result['speed_ratio']:.3f}x the speed by medians")
        print(
            f"  round by round {middle:.3f} ({low:.3f}-{high:.3f}); {result['cpu_ratio']:.3f}x the CPU time, ", end=""
        )
        print(f"{result['memory_ratio']:.3f}x the memory")
    steps = list(zip(*(f["losses"] for f in figures.values()), strict=True))
    apart = [(max(losses) - min(losses)) / abs(losses[0]) for losses in steps]
    result["loss_difference"] = {"first": apart[0], "greatest": max(apart)}
    result["losses_agree"] = apart[0] <= TOLERANCE and steps[-1][0] < steps[0][0]
    fell = f"{steps[0][0]:.4f} -> {steps[-1][0]:.4f}"
    print(f"losses {fell}; sides differ by {apart[0]:.1e} at first, {max(apart):.1e} at most")
    return result


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=WORKLOADS, default="gpt_char")
    parser.add_argument("--peer", help="a checkout of nanoGPT; without it Hugging Face GPT-2 is the peer")
    parser.add_argument("--sides", nargs="+", help=f"xylem[:{'|'.join(VARIANTS)}], nanogpt[-fused], hf[-compile]")
    parser.add_argument("--ours", choices=VARIANTS, help="put this variant of ours in xylem's place")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-per-round", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the counted rounds")
    parser.add_argument(
        "--pause", type=float, default=0.5, help="seconds between two turns, for spinning threads to rest"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--allocator", choices=["ours", "default"], default="ours", help="glibc settings of all sides (xylem/launch.py)"
    )
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    for hidden in ("--worker", "--weights", "--export"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    with tempfile.TemporaryDirectory() as folder:
        result = report(args, measure(args, Path(folder)))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    return None if result["losses_agree"] else sys.exit(1)


if __name__ == "__main__":
    main()
