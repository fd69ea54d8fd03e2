"""A training step of LoRA beside one of Hugging Face peft's, and beside full training: speed, CPU time and memory.

    python benchmarks/lora_step.py --out lora_step.json
    python benchmarks/lora_step.py --sides xylem:lora xylem:full

The network is ``llama`` of ``train_step.py``, random tokens; rank 8 beside all seven matrices of a layer, all else
frozen, the same first pairs on both sides (B zero, as LoRA begins), AdamW on them alone. ``full`` trains everything
and has no pairs. Sides of one kind are compared with each other, and ours of both kinds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ours
import peers
import sides
import train_step
from adapters import attached, grafted

RANK = 8


@dataclass(frozen=True)
class Workload(train_step.Workload):
    """One network and its batch, of which some matrices learn."""

    @property
    def flops(self) -> float:
        """Useful FLOPs a token of a LoRA step: without the frozen matrices' own gradients 4 for each weight, not 6."""
        attention = 6.0 * self.layers * self.length * self.width
        return attention + (super().flops - attention) * 4 / 6


WORKLOADS = {name: Workload(**vars(train_step.WORKLOADS[name])) for name in ("llama", "tiny_llama")}


def our_step(workload: Workload, kind: str, dtype: str) -> Callable[[int], float]:
    """``step(index) -> loss`` through the public path."""
    from xylem.peft import METHODS
    from xylem.peft.config import LoRAConfig

    config = train_step.our_config(workload, "auto", dtype)
    more: dict[str, Any] = {}
    if kind == "lora":
        more = {"graft": partial(with_pairs, config), "trains": METHODS["lora"].trainable(None, LoRAConfig())}
    return ours.stepper(config, train_step.loss, train_step.our_data(workload), **more)


def with_pairs(config: Any, params: Any) -> Any:
    """Our tree with the first pairs."""
    return grafted(config, params, 0, RANK, size=0.0)


def their_step(kind: str, workload: Workload, args: argparse.Namespace) -> Callable[[int], float]:
    """The same by transformers and peft."""
    compiled, _, variant = kind.partition(":")
    config = train_step.our_config(workload, "auto")
    attach = partial(attached, config=config, ranks=[RANK], size=0.0) if variant == "lora" else (lambda model: model)
    return peers.make(compiled, workload, args, attach)


def worker(side: str, args: argparse.Namespace) -> None:
    """One side's process: writes the first weights, or takes steps."""
    workload, (kind, _, variant) = WORKLOADS[args.config], side.partition(":")
    if args.export:
        return ours.save(train_step.our_config(workload, "auto"), args.export)
    if kind == "probe":
        return sides.answer(lambda: peers.probe(args))
    if kind == "xylem":
        return sides.answer(lambda: our_step(workload, variant, args.dtype))
    return sides.answer(lambda: their_step(side, workload, args))


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=WORKLOADS, default="llama")
    names = ["xylem:lora", "xylem:full", "hf:lora", "hf-compile:lora"]
    parser.add_argument("--sides", nargs="+", default=names, help="xylem, hf or hf-compile, with :lora or :full")
    sides.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    kind = lambda name: name.partition(":")[2]  # noqa: E731
    rounds = sides.measure(args.sides, args)
    figures = sides.report(WORKLOADS[args.config], args, rounds, lambda us, peer: kind(us) == kind(peer))
    if {"xylem:lora", "xylem:full"} < figures.keys():
        sides.ratios("xylem:lora", ["xylem:full"], figures, rounds)


if __name__ == "__main__":
    main()
