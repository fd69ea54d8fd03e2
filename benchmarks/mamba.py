"""A stack of Mamba blocks, forward and backward, beside mambapy and beside our own attention, in one run.

    pip install --no-deps mambapy==1.2.0
    python benchmarks/mamba.py --config 1024 --out mamba_1024.json
    python benchmarks/mamba.py --config 4096 --sides xylem attention --rounds 3 --out mamba_4096.json
    python benchmarks/mamba.py --config 1024 --sides xylem:chunked xylem:sequential xylem:parallel   # form against form
    python benchmarks/mamba.py --picture mamba.png mamba_*.json

Each side is a process of its own (``sides.py``) with the same allocator settings and threads. xylem and mambapy hold
the same weights and see the same inputs, vectors instead of tokens: no embedding and no head takes part. A step
computes mean(hidden * target) and its gradient by the inputs and every weight of the layers, in float32; the norms of
the gradients are compared. ``attention`` is our GPT-2 of the same width and as many layers, on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ours
import peers
import sides

LAYERS, WIDTH, BATCH, HEADS = 4, 512, 2, 8
VOCAB = 8  # of a table that nothing reads
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOLERANCE = 1e-4  # relative, between the gradient norms of two sides


def data(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, T, D)."""
    inputs, targets = np.random.default_rng(0).standard_normal((2, BATCH, length, WIDTH), np.float32)
    return inputs, targets


# --- the sides --------------------------------------------------------------------------------------------------------


def our_config(kind: str, form: Any, length: int):
    """A GPT-2 for ``attention``, else a Mamba."""
    from xylem.models import gpt, mamba
    from xylem.models.settings import Compute

    if kind == "attention":
        return gpt.gpt(LAYERS, WIDTH, HEADS, VOCAB, length)
    return mamba.mamba(LAYERS, WIDTH, VOCAB, length).with_compute(Compute(scan=form))


def our_step(config: Any, length: int) -> Callable[[int], float]:
    """``step(index) -> gradient norm``."""
    import jax
    import jax.numpy as jnp

    from xylem.launch import settle_jax
    from xylem.models import build

    settle_jax()
    module, params = build(config), jax.jit(lambda: ours.first_weights(config))()
    tokens, (inputs, targets) = jnp.zeros((BATCH, length), jnp.int32), map(jnp.asarray, data(length))

    def loss(params, inputs, targets):
        return jnp.mean(module.apply({"params": params}, tokens, embeddings=inputs).hidden * targets)

    @jax.jit
    def slopes(params, inputs, targets):
        weights, by_inputs = jax.grad(loss, (0, 1))(params, inputs, targets)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(weights["layers"])))
        return norm, weights, by_inputs  # returned, so that all of them are made

    return lambda _: float(jax.block_until_ready(slopes(params, inputs, targets))[0])


def mambapy_step(length: int, args: argparse.Namespace) -> Callable[[int], float]:
    """mambapy's stack and a last RMSNorm of its own, with our weights."""
    import torch
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm
    from safetensors.torch import load_file

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    tensors = load_file(f"{args.weights}/model.safetensors")
    stack, norm = Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS)), RMSNorm(WIDTH)
    stack.load_state_dict({name.removeprefix("backbone."): x for name, x in tensors.items() if ".layers." in name})
    norm.load_state_dict({"weight": tensors["backbone.norm_f.weight"]})
    stack, norm = stack.to(peers.device(args)), norm.to(peers.device(args))
    inputs, targets = (torch.from_numpy(each).to(peers.device(args)) for each in data(length))
    inputs.requires_grad_()

    def step(_: int) -> float:
        for value in (inputs, *stack.parameters(), *norm.parameters()):
            value.grad = None
        torch.mean(norm(stack(inputs)) * targets).backward()
        return math.sqrt(sum(float(torch.sum(x.grad**2)) for x in stack.parameters() if x.grad is not None))

    return step


def worker(side: str, args: argparse.Namespace) -> None:
    """One side's process: writes the weights, or takes steps."""
    length, (kind, _, form) = int(args.config), side.partition(":")
    if args.export:
        return ours.save(our_config(kind, "auto", length), args.export)
    if kind == "probe":
        return sides.answer(lambda: peers.probe(args))
    if kind == "mambapy":
        return sides.answer(lambda: mambapy_step(length, args))
    return sides.answer(lambda: our_step(our_config(kind, form or "auto", length), length))


# --- the comparison ---------------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, rounds: dict[str, list[dict]]) -> None:
    """Print and write the figures of each side from its counted rounds; exits with 1 where two did not do the same."""
    steps, length, probe = args.steps_per_round, int(args.config), rounds.pop("probe")
    peak = sides.spread([2 * steps * peers.PROBE[args.device] ** 3 / r["seconds"] / 1e9 for r in probe[1:]])
    print(f"\n{LAYERS} layers x {WIDTH}, batch {BATCH} x {length}; {sides.where(args)}")
    print(f"matrix-product peak in this run: {peak[0]:.0f} ({peak[1]:.0f}-{peak[2]:.0f}) GFLOP/s\n")
    row = "{:<18} {:>22} {:>10} {:>10} {:>8}".format
    print(row("side", "tokens/s (min-max)", "us/token", "CPU s/st", "peak GB"))
    figures, first = {}, rounds[args.sides[0]]
    for name, counted in rounds.items():
        speed = sides.spread([BATCH * length * steps / r["seconds"] for r in counted[1:]])
        cpu = sides.spread([r["cpu"] / steps for r in counted[1:]])[0]
        pairs = zip(first[1:], counted[1:], strict=True)
        figures[name] = {
            "tokens_per_second": speed,
            "cpu_seconds_per_step": cpu,
            "peak_bytes": counted[-1]["memory"],
            "first_is_faster_by_round": sides.spread([b["seconds"] / a["seconds"] for a, b in pairs]),
            "norm": counted[-1]["losses"][-1],
        }
        rate, memory = f"{speed[0]:.0f} ({speed[1]:.0f}-{speed[2]:.0f})", f"{counted[-1]['memory'] / 1e9:.2f}"
        print(row(name, rate, f"{1e6 / speed[0]:.0f}", f"{cpu:.2f}", memory))
    us = figures[args.sides[0]]
    for name, them in list(figures.items())[1:]:
        ratio = us["tokens_per_second"][0] / them["tokens_per_second"][0]
        middle, low, high = them["first_is_faster_by_round"]
        memory = us["peak_bytes"] / them["peak_bytes"]
        print(f"{args.sides[0]} to {name}: {ratio:.2f}x the speed by medians, {memory:.3f}x the memory")
        print(f"  round by round {middle:.2f} ({low:.2f}-{high:.2f})")
    norms = [one["norm"] for name, one in figures.items() if name != "attention"]  # which is another network
    apart = (max(norms) - min(norms)) / norms[0]
    print(f"gradient norms differ by {apart:.1e}")
    if args.out:
        args.out.write_text(json.dumps({"length": length, "sides": figures, "rounds": rounds, "probe": peak}, indent=1))
    if apart > TOLERANCE:
        sys.exit(1)


def picture(target: str, *files: str) -> None:
    """Microseconds a token by length, from what ``--out`` wrote."""
    import matplotlib.pyplot as plt

    curves: dict[str, list[tuple[int, float]]] = {}
    for result in sorted((json.loads(Path(file).read_text()) for file in files), key=lambda one: one["length"]):
        for name, figures in result["sides"].items():
            curves.setdefault(name, []).append((result["length"], 1e6 / figures["tokens_per_second"][0]))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        lengths, times = zip(*points, strict=True)
        axes.plot(lengths, times, marker="o", label={"xylem": "Mamba"}.get(name, name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"tokens a row ({BATCH} rows)")
    axes.set_ylabel("microseconds a token, forward and backward")
    axes.set_title(f"{LAYERS} layers of width {WIDTH}, float32")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=[str(length) for length in LENGTHS], default="1024", help="tokens a row")
    which = "xylem[:FORM], mambapy, attention; ratios are those of the first"
    parser.add_argument("--sides", nargs="+", default=["xylem", "mambapy"], help=which)
    parser.add_argument("--picture", nargs="+", metavar=("PNG", "JSON"), help="draw earlier results instead")
    sides.add_arguments(parser)
    parser.set_defaults(rounds=5, steps_per_round=1, warmup=1)
    args = parser.parse_args()
    if args.dtype != "float32":
        parser.error("--dtype float32: gradients are compared more closely than others allow")
    if args.worker:
        return worker(args.worker, args)
    if args.picture:
        return picture(*args.picture)
    return report(args, sides.measure(args.sides, args))


if __name__ == "__main__":
    main()
