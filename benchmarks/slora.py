"""A batch of requests with an adapter each: our throughput by the number of adapters, and beside Hugging Face peft's.

    python benchmarks/slora.py --out slora.json
    python benchmarks/slora.py --config read --sides xylem:none xylem:32 hf:none hf:32

A side is a network, ours or transformers', and what serves its 32 requests: ``none``; ``N``, adapters of rank 8 out of
a pool of N, drawn anew for each batch (with 32 every request has another); ``N-mixed``, of ranks 8, 16, 32 and 64.
peft is given a mixed batch by its ``adapter_names``. A step is a batch, whose adapters it brings into place first; both
sides load the same base and fill in the same adapters, and the first tokens that they write are compared.

LLaMA's shape: 12 layers of 768, 12 heads over 6, feed-forward 2,304, vocabulary 32,000, tied: 110 million weights.
Adapters stand beside all seven matrices of a layer. ``--dtype bfloat16`` is that of the weights too, as one serves, and
of our pairs; peft keeps its own in float32 by default, and is faster for it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import ours
import peers
import sides
from adapters import attached, grafted

from xylem.models import llama
from xylem.models.config import TransformerConfig
from xylem.models.settings import Compute

RANK, MIXED = 8, (8, 16, 32, 64)


@dataclass(frozen=True)
class Workload:
    """Requests of ``length`` tokens, each answered with ``written`` more, greedily."""

    preset: str
    requests: int
    length: int
    written: int

    @property
    def config(self) -> TransformerConfig:
        """The network."""
        sizes = {"serve": (12, 768, 12, 6, 2304, 32000), "tiny": (2, 24, 4, 2, 40, 96)}[self.preset]
        return llama.llama(*sizes, max_length=256, rope_theta=10000.0, norm_eps=1e-5, head="tied")

    @property
    def tokens(self) -> int:
        """Tokens a step, read and written."""
        return self.requests * (self.length + self.written)


WORKLOADS = {
    "answer": Workload("serve", 32, 32, 32),
    "chat": Workload("serve", 32, 32, 128),
    "read": Workload("serve", 32, 128, 1),
    "tiny": Workload("tiny", 4, 8, 4),  # shows that the script works
}


def prompts(workload: Workload, index: int) -> np.ndarray:
    """The requests of one step."""
    rng = np.random.default_rng((1, index % 4))
    return rng.integers(0, workload.config.vocab_size, (workload.requests, workload.length))


def drawn(workload: Workload, adapters: int, index: int) -> np.ndarray:
    """Which adapter each of them has: all another one where there are enough."""
    rng = np.random.default_rng((2, index))
    return rng.choice(adapters, workload.requests, replace=adapters < workload.requests)


def asked(variant: str) -> list[int]:
    """The ranks of the adapters of a variant."""
    count, _, mixed = variant.replace("none", "0").partition("-")
    return [MIXED[i % len(MIXED)] if mixed else RANK for i in range(int(count))]


# --- the two sides ----------------------------------------------------------------------------------------------------


def our_step(workload: Workload, variant: str, args: argparse.Namespace) -> Callable[[int], list[int]]:
    """``step(index) -> the first token written for each request``."""
    import jax

    from xylem.generation.sampling import Sampling, generate
    from xylem.launch import settle_jax
    from xylem.models import build
    from xylem.models.decoding import ready
    from xylem.peft.methods import slora

    settle_jax()
    config = workload.config.with_compute(Compute(args.dtype, args.dtype))
    drawn_in_float32 = jax.jit(partial(ours.first_weights, workload.config))()  # as the peer's were
    module, base = build(config), jax.tree.map(lambda x: x.astype(args.dtype), drawn_in_float32)
    adapters = [grafted(config, base, i, rank) for i, rank in enumerate(asked(variant))]
    adapters = jax.tree.map(lambda x: x.astype(args.dtype), adapters)
    pool, count = ready(config, slora.stack(base, adapters) if adapters else base), len(adapters)
    del adapters, base, drawn_in_float32
    sampling, assign = Sampling(workload.written, temperature=0.0), jax.jit(slora.assign)

    def step(index: int) -> list[int]:
        params = assign(pool, jax.numpy.asarray(drawn(workload, count, index), jax.numpy.int32)) if count else pool
        out = generate(module, params, prompts(workload, index).tolist(), sampling, jax.random.key(0))
        return [int(row[0]) for row in out.tokens]

    return step


def their_step(workload: Workload, variant: str, args: argparse.Namespace) -> Callable[[int], list[int]]:
    """The same by transformers and peft."""
    import torch
    import transformers

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(args.weights, dtype=getattr(torch, args.dtype))
    ranks = asked(variant)
    model = attached(model, workload.config, ranks).eval().to(peers.device(args))
    length = {"max_new_tokens": workload.written, "min_new_tokens": workload.written, "do_sample": False}

    def step(index: int) -> list[int]:
        more = {"adapter_names": [str(i) for i in drawn(workload, len(ranks), index)]} if ranks else {}
        tokens = torch.tensor(prompts(workload, index)).to(peers.device(args))
        with torch.no_grad():
            out = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), **length, **more, pad_token_id=0
            )
        return out[:, workload.length].tolist()

    return step


def worker(side: str, args: argparse.Namespace) -> None:
    """One side's process: writes the base, or answers batches."""
    workload, (kind, _, variant) = WORKLOADS[args.config], side.partition(":")
    if args.export:
        return ours.save(workload.config, args.export)
    if kind == "probe":
        return sides.answer(lambda: peers.probe(args))
    make = our_step if kind == "xylem" else their_step
    return sides.answer(lambda: make(workload, variant, args))


# --- the comparison ---------------------------------------------------------------------------------------------------

RATIOS = (
    ("throughput with 100 adapters to that with 5", "xylem:100", "xylem:5", "at least 0.95"),
    ("throughput with an adapter each to that without any", "xylem:32", "xylem:none", "at least 1 / 1.24 = 0.806"),
    ("the same, ranks 8 to 64", "xylem:32-mixed", "xylem:none", "no target"),
    ("ours to peft's, an adapter each", "xylem:32", "hf:32", "at least 5"),
    ("ours to transformers', no adapter", "xylem:none", "hf:none", "no target"),
    ("peft's with an adapter each to transformers' without any", "hf:32", "hf:none", "no target"),
)


def report(workload: Workload, args: argparse.Namespace, rounds: dict[str, list[dict]]) -> None:
    """Print and write tokens a second by side, and the ratios."""
    rounds.pop("probe")
    print(f"\n{args.config}: {asdict(workload)}; {workload.tokens} tokens a batch; {sides.where(args)}")
    row = "{:<16} {:>24} {:>12} {:>9} {:>9}".format
    print(row("side", "tokens/s (min-max)", "CPU s/batch", "peak GB", "start s"))
    figures: dict[str, Any] = {}
    for name, counted in rounds.items():
        steps = args.steps_per_round
        speed = sides.spread([workload.tokens * steps / r["seconds"] for r in counted[1:]])
        cpu, last = statistics.median(r["cpu"] / steps for r in counted[1:]), counted[-1]
        first = [token for r in counted for batch in r["losses"] for token in batch]
        figures[name] = {
            "tokens_per_second": speed,
            "cpu_seconds": cpu,
            "peak_bytes": last["memory"],
            "first_tokens": first,
        }
        rate = f"{speed[0]:.0f} ({speed[1]:.0f}-{speed[2]:.0f})"
        print(row(name, rate, f"{cpu:.2f}", f"{last['memory'] / 1e9:.2f}", f"{counted[0]['since_start']:.0f}"))
    ratios = {}
    for what, us, them, target in RATIOS:
        if us in rounds and them in rounds:
            by_round = [b["seconds"] / a["seconds"] for a, b in zip(rounds[us][1:], rounds[them][1:], strict=True)]
            whole = figures[us]["tokens_per_second"][0] / figures[them]["tokens_per_second"][0]
            ratios[what] = {"medians": whole, "by_round": sides.spread(by_round)}
            middle, low, high = ratios[what]["by_round"]
            print(f"{what}: {whole:.3f} by medians; by round {middle:.3f} ({low:.3f}-{high:.3f}); {target}")
    agree = _agree(figures)
    if args.out:
        result = {"config": args.config, "workload": asdict(workload), "sides": figures, "ratios": ratios}
        args.out.write_text(json.dumps(result | {"rounds": rounds, "first_tokens_agree": agree}, indent=1))
    if not agree and args.dtype == "float32":  # bfloat16 rounds the logits of two likely tokens to one
        sys.exit(1)


def _agree(figures: dict[str, Any]) -> bool:
    """Whether ours and theirs, given the same adapters, wrote the same first tokens; printed too."""
    good = True
    for name, figure in figures.items():
        peer = figures.get(name.replace("xylem", "hf"))
        if name.startswith("xylem") and peer is not None:
            pairs = list(zip(figure["first_tokens"], peer["first_tokens"], strict=True))
            same = sum(one == other for one, other in pairs)
            print(f"{name} and its peer wrote the same first token to {same} of {len(pairs)} requests")
            good &= same == len(pairs)
    return good


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=WORKLOADS, default="answer")
    names = ["xylem:none", "xylem:5", "xylem:32", "xylem:100", "xylem:32-mixed", "hf:none", "hf:32"]
    parser.add_argument("--sides", nargs="+", default=names, help="xylem|hf with :none, :N or :N-mixed")
    sides.add_arguments(parser)
    parser.set_defaults(rounds=3, steps_per_round=1, warmup=1)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    report(WORKLOADS[args.config], args, sides.measure(args.sides, args))


if __name__ == "__main__":
    main()
