"""Full training step (forward, backward, AdamW) beside the peers: speed, CPU time and memory, in one run.

    python benchmarks/train_step.py --config gpt_char --peer DIR     # DIR: a checkout of nanoGPT
    python benchmarks/train_step.py --config llama --out llama.json
    python benchmarks/train_step.py --config gpt_char --sides xylem xylem:scan xylem:plain

Each side is a process of its own with the same allocator settings, threads, first weights, token batches and AdamW
constants. The parent asks one side at a time for a round of steps, in a new order every round, so that all see the same
machine; the others sleep meanwhile. A process that only multiplies matrices takes its turn too: the share of the peak
is of that. float32 unless --dtype says otherwise, no dropout, no clipping. All losses are compared step by step: who
computes something else shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ours
import peers
import sides


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
    "gpt2": Workload("gpt", 12, 768, 12, 12, 3072, 50304, 1024, 16),  # these two for GPUs
    "llama_1b": Workload("llama", 16, 2048, 32, 8, 8192, 32000, 2048, 4),
    "tiny_gpt": Workload("gpt", 2, 32, 2, 2, 128, 96, 16, 4),  # the last two show that the script works
    "tiny_llama": Workload("llama", 2, 32, 4, 2, 48, 96, 16, 4),
}
VARIANTS = {  # of ours: Compute.layers, Compute.kernels
    "auto": ("auto", "auto"),
    "scan": ("scan", "auto"),
    "unroll": ("unroll", "auto"),
    "plain": ("auto", "plain"),
    "fused": ("auto", "fused"),
    "plain-scan": ("scan", "plain"),
}


# --- ours -------------------------------------------------------------------------------------------------------------


def our_config(workload: Workload, variant: str, dtype: Any = "float32"):
    """The public config of the network; with the exact GELU, because nanoGPT has it."""
    from dataclasses import replace

    from xylem.models import gpt, llama
    from xylem.models.settings import Compute

    layers, kernels = VARIANTS[variant]
    w = workload
    if w.family == "gpt":
        config = replace(gpt.gpt(w.layers, w.width, w.heads, w.vocab, w.length), activation="gelu")
    else:
        config = llama.llama(w.layers, w.width, w.heads, w.kv_heads, w.ff, w.vocab, w.length, 1e4, 1e-5)
    return replace(config, compute=Compute(dtype, layers=layers, kernels=kernels))


def our_data(workload: Workload) -> list[dict[str, Any]]:
    """The batches as our objectives take them."""
    import numpy as np

    weights = np.ones((workload.batch, workload.length), np.float32)
    return [
        {"tokens": tokens.astype(np.int32), "labels": labels.astype(np.int32), "weights": weights}
        for tokens, labels in peers.batches(workload.vocab, workload.batch, workload.length)
    ]


def loss(module: Any, params: Any, batch: Any, rng: Any) -> Any:
    """Cross-entropy of the next token."""
    from xylem.training.objective_config import ObjectiveConfig
    from xylem.training.objectives import causal_lm

    return causal_lm(module, ObjectiveConfig(), params, batch, rng)


def our_step(workload: Workload, variant: str, dtype: str) -> Callable[[int], float]:
    """``step(index) -> loss`` through the public path."""
    return ours.stepper(our_config(workload, variant, dtype), loss, our_data(workload))


def worker(side: str, args: argparse.Namespace) -> None:
    """One side's process: writes the first weights, or takes steps."""
    workload, (kind, _, variant) = WORKLOADS[args.config], side.partition(":")
    variant = variant or "auto"
    if args.export:
        return ours.save(our_config(workload, variant), args.export)
    if kind == "xylem":
        return sides.answer(lambda: our_step(workload, variant, args.dtype))
    return sides.answer(lambda: peers.make(kind, workload, args))


def default_sides(workload: Workload, args: argparse.Namespace) -> list[str]:
    """Ours, and the peers there are for this network."""
    theirs = ["hf", "hf-compile"]
    if workload.family == "gpt" and args.peer:
        theirs = ["nanogpt"] if args.device == "gpu" else ["nanogpt", "nanogpt-fused"]
    return [f"xylem:{args.ours}" if args.ours else "xylem", *theirs]


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=WORKLOADS, default="gpt_char")
    parser.add_argument("--peer", help="a checkout of nanoGPT; without it Hugging Face GPT-2 is the peer")
    parser.add_argument("--sides", nargs="+", help=f"xylem[:{'|'.join(VARIANTS)}], nanogpt[-fused], hf[-compile]")
    parser.add_argument("--ours", choices=VARIANTS, help="put this variant of ours in xylem's place")
    sides.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    workload = WORKLOADS[args.config]
    peer = ["--peer", args.peer] if args.peer else []
    sides.report(workload, args, sides.measure(args.sides or default_sides(workload, args), args, *peer))


if __name__ == "__main__":
    main()
