"""AdaLoRA against LoRA at the same budget: kinds of questions told apart by a real BERT, over some seeds.

    python scripts/adalora.py --run-dir runs/adalora

all-MiniLM-L6-v2 learns which of six kinds a question of TREC is (xylem/data/trec.py), with ``--rank`` columns and rows
beside every matrix in its layers (LoRA), or with more of them at first and so many on average in the end (AdaLoRA
2303.10512, section 4: the budget is that of the end). A seed draws adapters, head and batches, for both the same. Each
run has a folder below --run-dir; what is done is not done again; stopped, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xylem.launch import launch

if TYPE_CHECKING:
    from xylem.training.finetune_config import FinetuneConfig

Arm = Literal["lora", "adalora"]
ARMS: tuple[Arm, ...] = ("lora", "adalora")
RESULT = "result.json"


@dataclass(frozen=True)
class Arguments:
    """What to compare.

    Attributes:
        base: what is taught, as scripts/finetune.py takes it.
        arms: which of the two.
        seeds: one run of each arm for each.
        rank: of LoRA; and AdaLoRA's in the end, on average.
        first: AdaLoRA's at first (1.5 times the budget in 2303.10512, section 4).
        scale: what LoRA's product is multiplied by.
        adaptive_scale: what AdaLoRA's is: its columns and rows are held at length 1, so that its values alone, which
            begin at zero and move by the rate each step, make it as long as LoRA's B becomes.
        rate: AdamW's peak.
        steps: of each run.
        batch_size: questions a step.
        sequence_length: tokens of a question that are read.
        run_dir: adalora.json, and a folder a run.
    """

    base: str = "minilm"
    arms: tuple[Arm, ...] = ARMS
    seeds: tuple[int, ...] = field(default=(0, 1, 2, 3, 4))
    rank: int = 2
    first: int = 3
    scale: float = 2.0
    adaptive_scale: float = 64.0
    rate: float = 5e-3
    steps: int = 150
    batch_size: int = 16
    sequence_length: int = 20
    run_dir: str = "runs/adalora"


def main(arguments: list[str]) -> None:
    """Parse, train and judge what is missing, show."""
    import tyro

    from xylem.errors import ConfigError

    parsed = tyro.cli(Arguments, prog="adalora.py", description=__doc__, args=arguments)
    for name in ("arms", "seeds"):
        if not getattr(parsed, name):
            raise ConfigError(name, "", "at least one")

    from xylem.training.restore import open_any

    model = open_any(parsed.base)
    for seed in parsed.seeds:
        for arm in parsed.arms:
            if not result_of(parsed, arm, seed).is_file() and not trained(parsed, arm, seed, model):
                return print("stopped; the same command goes on")
    return show(parsed)


def result_of(parsed: Arguments, arm: Arm, seed: int) -> Path:
    """Where the figures of a run are kept."""
    return Path(parsed.run_dir) / f"{arm}-{seed}" / RESULT


def run_of(parsed: Arguments, arm: Arm, seed: int, model: Any) -> FinetuneConfig:
    """One run."""
    from xylem.data.config import DataConfig
    from xylem.data.trec import TREC
    from xylem.peft.config import AdaLoRAConfig, LoRAConfig
    from xylem.training.config import OptimizerConfig
    from xylem.training.finetune_config import FinetuneConfig
    from xylem.training.objective_config import ObjectiveConfig

    method = {
        "lora": LoRAConfig(rank=parsed.rank, alpha=parsed.scale * parsed.rank),
        "adalora": AdaLoRAConfig(parsed.first, parsed.rank, alpha=parsed.adaptive_scale * parsed.first),
    }[arm]
    return FinetuneConfig(
        model=model.module.config,
        data=DataConfig(TREC, tokenizer=model.data.tokenizer, sequence_length=parsed.sequence_length),
        optimizer=OptimizerConfig(learning_rate=parsed.rate, warmup_steps=min(30, parsed.steps // 4), weight_decay=0.0),
        objective=ObjectiveConfig("classification"),
        steps=parsed.steps,
        batch_size=parsed.batch_size,
        seed=seed,
        evaluate_every=0,
        save_every=0,
        sample_every=0,
        base=parsed.base,
        method=method,
        run_dir=str(result_of(parsed, arm, seed).parent),
    )


def trained(parsed: Arguments, arm: Arm, seed: int, model: Any) -> bool:
    """Do one run and keep its figures; False where it was stopped."""
    import json
    import sys

    from xylem.files import write_whole
    from xylem.training.finetune import finetune

    print(f"\n{arm}, seed {seed}")
    config = run_of(parsed, arm, seed, model)
    summary = finetune(config, model.params, model.tokenizer, sys.argv)
    if summary["step"] < parsed.steps:
        return False
    found = {"loss": summary["validation_loss"], **judged(config)}
    print(f"right {found['accuracy']:.1%}, {found['parameters']:,} parameters")
    write_whole(result_of(parsed, arm, seed), json.dumps(found, indent=2) + "\n")
    return True


def judged(config: FinetuneConfig) -> dict[str, float]:
    """The share of held-out questions whose kind a run tells right, and how many numbers of its adapter count.

    Of AdaLoRA those count that belong to a value which stayed: the others add nothing and need not be kept.
    """
    from xylem.peft import saving
    from xylem.training.checkpoint import load_params
    from xylem.training.evaluate import evaluate, measured
    from xylem.training.restore import open_any

    model = open_any(config.run_dir, "float32", measured)
    found = evaluate(model, model.data, "validation", 50, None)
    learned, _ = load_params(config.run_dir, entries=("trainable",))
    return {"accuracy": found["accuracy"], "parameters": parameters(saving.arrays(learned))}


def parameters(learned: dict[str, Any]) -> int:
    """Numbers of an adapter that count, the head's apart."""
    import numpy as np

    total = 0
    for path, a in learned.items():
        if path.endswith("/a"):
            values = learned.get(path.removesuffix("a") + "values")
            kept = a.shape[0] * a.shape[-1] if values is None else int(np.count_nonzero(values))
            total += kept * (a.shape[1] + learned[path.removesuffix("a") + "b"].shape[-1] + (values is not None))
    return total


def show(parsed: Arguments) -> None:
    """The table of both arms."""
    import json
    import statistics
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from xylem.files import write_whole

    found = {
        arm: [json.loads(result_of(parsed, arm, seed).read_text()) for seed in parsed.seeds] for arm in parsed.arms
    }
    table = Table(box=None, pad_edge=False)
    for name in ("", "parameters", "right, mean", "spread", "held-out loss"):
        table.add_column(name, justify="right" if name else "left")
    for arm, rows in found.items():
        right = [row["accuracy"] for row in rows]
        spread = f"{statistics.stdev(right):.1%}" if len(right) > 1 else ""
        counted, loss = (statistics.mean(row[name] for row in rows) for name in ("parameters", "loss"))
        table.add_row(arm, f"{counted:,.0f}", f"{statistics.mean(right):.1%}", spread, f"{loss:.3f}")
    console = Console()
    console.print(f"\n[bold]TREC 10, {len(parsed.seeds)} seeds, {parsed.steps} steps of {parsed.batch_size}[/bold]")
    console.print(table)
    path = Path(parsed.run_dir) / "adalora.json"
    write_whole(path, json.dumps({"settings": asdict(parsed), "runs": found}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    launch(main)
