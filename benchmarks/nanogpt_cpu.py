"""The CPU run that nanoGPT publishes, theirs and ours on the same text: final validation loss and wall time.

    python benchmarks/nanogpt_cpu.py --peer DIR --out result.json     # DIR: a checkout of nanoGPT

4 layers, 4 heads, width 128, context 64, batch 12, 2,000 iterations, dropout 0, characters of WikiText-2; AdamW with
betas (0.9, 0.99), 100 steps of warm-up, a cosine from 1e-3 to 1e-4, clipping at 1.
Ours is `scripts/pretrain.py nanogpt_cpu` as a user runs it. Theirs is their `model.py` and optimizer under the loop of
their `train.py`: windows at random places of the text. Seeds alternate, each side a fresh process timed from start to
end, evaluation of the whole validation split included; both predict the same characters of it in the same windows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from xylem.launch import ALLOCATOR

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain.py"


def train_theirs(peer: str, seed: int, steps: int) -> float:
    """nanoGPT's model trained as its ``train.py`` does; mean validation loss in nats a character."""
    import numpy as np
    import torch

    from xylem.configs.pretrain import nanogpt_cpu
    from xylem.data import pipeline

    config = nanogpt_cpu()
    data = pipeline.prepare(config.data)
    windows = data.batch(source := data.source("train"), np.arange(len(source)))
    stream = torch.tensor(windows["tokens"][windows["segments"] > 0].astype(np.int64))
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)
    spec: Any = importlib.util.spec_from_file_location("nanogpt_model", Path(peer) / "model.py")
    code = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    model_config, length, rows = config.model, config.data.sequence_length, config.batch_size
    sizes = (length, model_config.vocab_size, model_config.num_layers, model_config.num_heads, model_config.d_model)
    model = code.GPT(code.GPTConfig(*sizes, dropout=0.0, bias=False))
    constants = config.optimizer
    peak, last = constants.learning_rate, constants.learning_rate * constants.final_fraction
    optimizer = model.configure_optimizers(constants.weight_decay, peak, (constants.beta1, constants.beta2), "cpu")
    for step in range(steps):
        rate = peak * (step + 1) / (constants.warmup_steps + 1)
        if step >= constants.warmup_steps:
            done = (step - constants.warmup_steps) / (steps - constants.warmup_steps)
            rate = last + 0.5 * (1 + math.cos(math.pi * done)) * (peak - last)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - length, (rows,))
        tokens = torch.stack([stream[start : start + length] for start in starts])
        labels = torch.stack([stream[start + 1 : start + length + 1] for start in starts])
        loss = model(tokens, labels)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), constants.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    total = weight = 0.0
    with torch.no_grad():
        for batch in pipeline.eval_batches(data, "validation", 128):
            tokens, labels = (torch.tensor(batch[name].astype(np.int64)) for name in ("tokens", "labels"))
            real = torch.tensor(batch["weights"])
            logits = model(tokens, labels)[0]
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total += float((nll * real.flatten()).sum())
            weight += float(real.sum())
    return total / weight


def run(side: str, peer: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """One process of one side: wall seconds and validation loss."""
    if side == "ours":
        target = folder / f"ours-{seed}"
        flags = ["--seed", str(seed), "--steps", str(steps), "--run-dir", str(target), "--evaluate-every", "0"]
        command = [sys.executable, str(SCRIPT), "nanogpt_cpu", *flags, "--save-every", "0", "--sample-every", "0"]
    else:
        command = [sys.executable, __file__, "--peer", peer, "--worker", str(seed), "--steps", str(steps)]
    start = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, **ALLOCATOR, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{side}, seed {seed}:\n{done.stderr[-2000:]}")
    if side == "ours":
        loss = json.loads((target / "summary.json").read_text())["validation_loss"]
    else:
        loss = float(done.stdout.split()[-1])
    return {"seed": seed, "validation_loss": loss, "seconds": seconds}


def main() -> None:
    """Alternate the sides over the seeds; print and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a checkout of nanoGPT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        print(train_theirs(args.peer, args.worker, args.steps))
        return

    from xylem.configs.pretrain import nanogpt_cpu
    from xylem.data import pipeline

    pipeline.prepare(nanogpt_cpu().data)  # both sides read it; neither is timed making it
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "nanogpt": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for side in ("ours", "nanogpt") if seed % 2 == 0 else ("nanogpt", "ours"):
                rows[side].append(run(side, args.peer, seed, args.steps, Path(folder)))
                print(side, rows[side][-1], flush=True)
    for side, results in rows.items():
        losses = [row["validation_loss"] for row in results]
        error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
        seconds = statistics.median(row["seconds"] for row in results)
        print(f"{side:8} validation loss {statistics.mean(losses):.4f} +- {error:.4f}, median wall {seconds:.1f} s")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
