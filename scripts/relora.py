"""Training at low rank, with and without restarts: ReLoRA between LoRA and all weights, from the same beginning.

    python scripts/relora.py --run-dir runs/relora

A small LLaMA learns with all its weights for a while, as ReLoRA begins (2307.05695, section 3). From there it goes on
three times over the same tokens: with all weights; with a low-rank pair beside each matrix of its layers (``lora``);
and with pairs that are moved into the matrices and begun anew ``--restarts`` times (``relora``). Embeddings and norms
learn in all three. All of it is done for each of some seeds. Each is a run folder below --run-dir; what is done is not
done again, and stopped, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xylem.data.config import DataConfig
from xylem.launch import launch

if TYPE_CHECKING:
    from xylem.training.config import RunConfig
    from xylem.training.finetune_config import FinetuneConfig

ARMS = ("full", "lora", "relora")
WARM = "warm"


@dataclass(frozen=True)
class Arguments:
    """What to compare.

    Attributes:
        data: the text, the tokenizer and the window length.
        articles: of the validation text, the first so many are validated on.
        width: of the 4-layer model.
        warm: steps with all weights before the three part.
        steps: of each of the three.
        restarts: of ``relora``, at equal distances.
        rank: of the pairs.
        prune: see ``ReLoRAConfig``.
        batch_size: windows a step.
        rate: AdamW's peak where all weights learn.
        low_rank_rate: its peak where pairs do; ReLoRA takes a higher one, too (section 4).
        points: of each curve.
        seeds: of weights and batches; the three are compared seed by seed.
        run_dir: relora.json, relora.png, and a folder a seed.
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer="bpe:512", sequence_length=128))
    articles: int = 5
    width: int = 64
    warm: int = 200
    steps: int = 1000
    restarts: int = 3
    rank: int = 1
    prune: float = 0.99
    batch_size: int = 8
    rate: float = 2e-3
    low_rank_rate: float = 6e-3
    points: int = 10
    seeds: tuple[int, ...] = field(default=(0, 1, 2, 3, 4))
    run_dir: str = "runs/relora"


def main(arguments: list[str]) -> None:
    """Parse, train what is missing, show."""
    import tyro

    from xylem.errors import ConfigError

    parsed = tyro.cli(Arguments, prog="relora.py", description=__doc__, args=arguments)
    for name in ("articles", "warm", "restarts", "rank", "points"):
        if getattr(parsed, name) < 1:
            raise ConfigError(name, getattr(parsed, name), "it must be at least 1")
    if parsed.steps < 2 * (parsed.restarts + 1):
        raise ConfigError("steps", parsed.steps, f"at least two for each of the {parsed.restarts + 1} stretches")
    if not parsed.seeds or len(set(parsed.seeds)) < len(parsed.seeds):
        raise ConfigError("seeds", " ".join(map(str, parsed.seeds)), "give one or several, each once")

    import sys

    from xylem.training.finetune import finetune
    from xylem.training.loop import pretrain
    from xylem.training.restore import open_any

    keep_beginning(parsed)
    for seed in parsed.seeds:
        warm = warm_run(parsed, seed)
        print(f"\nseed {seed}, {WARM}")
        if pretrain(warm, sys.argv)["step"] < warm.steps:
            return print("stopped; the same command goes on")
        model = open_any(warm.run_dir)
        for arm in ARMS:
            print(f"\nseed {seed}, {arm}")
            run = arm_run(parsed, seed, arm, model)
            if finetune(run, model.params, model.tokenizer, sys.argv)["step"] < parsed.steps:
                return print("stopped; the same command goes on")
    return show(parsed)


def folder_of(parsed: Arguments, seed: int, name: str) -> Path:
    """The run folder of an arm, or of the beginning."""
    return Path(parsed.run_dir) / f"seed-{seed}" / name


def keep_beginning(parsed: Arguments) -> None:
    """Write the first articles of the validation text as a file of their own."""
    import itertools
    import json

    from xylem.data.corpora import open_corpus
    from xylem.files import write_whole

    Path(parsed.run_dir).mkdir(parents=True, exist_ok=True)
    documents = itertools.islice(open_corpus(parsed.data).splits["validation"](), parsed.articles)
    write_whole(validation_file(parsed), "".join(json.dumps({"text": document}) + "\n" for document in documents))


def validation_file(parsed: Arguments) -> str:
    """Where ``keep_beginning`` writes."""
    return str(Path(parsed.run_dir) / "validation.jsonl")


def warm_run(parsed: Arguments, seed: int) -> RunConfig:
    """The run with all weights that the three go on from; its rate stays up, as theirs begin there."""
    from dataclasses import replace

    from xylem.data import pipeline
    from xylem.models.llama import llama
    from xylem.training.config import MeshConfig, OptimizerConfig, RunConfig

    data = replace(parsed.data, validation=validation_file(parsed), text_field="text")
    width, length, tokenizer = parsed.width, parsed.data.sequence_length, pipeline.prepare(data).tokenizer
    sizes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "max_length": length}
    model = llama(4, width, 4, 4, width * 11 // 4, rope_theta=1e4, norm_eps=1e-5, head="tied", **sizes)
    return RunConfig(
        model=model,
        data=data,
        optimizer=OptimizerConfig("adamw", parsed.rate, "constant", min(50, parsed.warm // 2), weight_decay=0.0),
        mesh=MeshConfig(data=1),  # a small model: one device
        steps=parsed.warm,
        batch_size=parsed.batch_size,
        seed=seed,
        evaluate_every=0,
        save_every=0,
        sample_every=0,
        run_dir=str(folder_of(parsed, seed, WARM)),
    )


def arm_run(parsed: Arguments, seed: int, arm: str, model: Any) -> FinetuneConfig:
    """One of the three: the same batches and the same cosine, which for ``relora`` has the teeth of its restarts."""
    import sys

    from xylem.peft.config import ReLoRAConfig, SelectionConfig
    from xylem.training.config import MeshConfig, OptimizerConfig
    from xylem.training.finetune_config import FinetuneConfig
    from xylem.training.objective_config import ObjectiveConfig

    stretch = -(-parsed.steps // (parsed.restarts + 1))
    every = stretch if arm == "relora" else parsed.steps
    pairs = {"rank": parsed.rank, "alpha": 2.0 * parsed.rank, "prune": parsed.prune}
    rewarm = min(50, stretch // 25)  # 2307.05695, section 4: 50 to 100 steps of some thousand
    low = ReLoRAConfig(every=every, rewarm=rewarm, others="learn", **pairs)
    rate = parsed.rate if arm == "full" else parsed.low_rank_rate
    return FinetuneConfig(
        model=model.module.config,
        data=model.data,
        optimizer=OptimizerConfig("adamw", rate, "cosine", min(50, stretch // 4), weight_decay=0.0),
        objective=ObjectiveConfig(),
        mesh=MeshConfig(data=1),
        steps=parsed.steps,
        batch_size=parsed.batch_size,
        seed=seed + 1,  # other batches than the beginning's
        evaluate_every=max(1, parsed.steps // parsed.points),
        evaluate_batches=sys.maxsize,
        save_every=0,
        sample_every=0,
        base=str(folder_of(parsed, seed, WARM)),
        method=SelectionConfig(targets=".") if arm == "full" else low,
        run_dir=str(folder_of(parsed, seed, arm)),
    )


def show(parsed: Arguments) -> None:
    """The table of the ends, what tells ``relora`` from the others, and the figure of the means."""
    import json
    from dataclasses import asdict

    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from xylem.files import write_whole
    from xylem.training.plots import loss_curves

    tokens, count = parsed.batch_size * parsed.data.sequence_length, len(parsed.seeds)
    runs = {name: [curve(folder_of(parsed, seed, name)) for seed in parsed.seeds] for name in (WARM, *ARMS)}
    start = float(np.mean([points[-1][1] for points in runs[WARM]]))
    means = {arm: np.mean(runs[arm], axis=0).tolist() for arm in ARMS}
    curves = {arm: [[0, start], *([round(step * tokens), loss] for step, loss in means[arm])] for arm in ARMS}
    ends = {arm: [points[-1][1] for points in runs[arm]] for arm in ARMS}
    table = Table(box=None, pad_edge=False)
    for name in ("", "validation loss", "relora's is lower by"):
        table.add_column(name, justify="right" if name else "left")
    for arm in ARMS:
        lower = np.array(ends[arm]) - ends["relora"]
        error = f" ± {lower.std(ddof=1) / count**0.5:.4f}" if count > 1 else ""
        table.add_row(arm, f"{np.mean(ends[arm]):.4f}", "" if arm == "relora" else f"{lower.mean():.4f}{error}")
    console = Console()
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    console.print(f"\n[bold]after {parsed.steps * tokens:,} tokens from {start:.4f}; {seeds}, standard error[/bold]")
    console.print(table)
    path, figure = Path(parsed.run_dir) / "relora.json", Path(parsed.run_dir) / "relora.png"
    kept = {"settings": asdict(parsed), "curves": curves, "ends": ends}
    write_whole(path, json.dumps(kept, indent=2) + "\n")
    loss_curves(curves, figure)
    print(f"{path}, {figure}")


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of a run, in order."""
    import json

    from xylem.training.run_folder import METRICS

    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]


if __name__ == "__main__":
    launch(main)
