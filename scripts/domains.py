"""An adapter for each domain on one real model, and what they are worth on each other's, alone and composed.

    python scripts/domains.py --run-dir runs/domains        # some 20 minutes of CPU time

LoRA teaches SmolLM2-135M-Instruct finance, medicine and law apart (xylem/data/domains.py), each with a run folder below
--run-dir. Then the base, each adapter and their sums, means and merges (xylem/peft/compose.py) answer the held-out
questions of every domain. What is done is not done again; stopped, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xylem.launch import launch

if TYPE_CHECKING:
    from xylem.training.finetune_config import FinetuneConfig

Domain = Literal["finance", "medicine", "law"]
DOMAINS: tuple[Domain, ...] = ("finance", "medicine", "law")
ROWS = "domains.json"


@dataclass(frozen=True)
class Arguments:
    """What to teach.

    Attributes:
        base: any decoder that scripts/generate.py opens.
        domains: at least two.
        rank: of the pairs, beside every matrix in a layer.
        learning_rate: AdamW's peak.
        steps: of each domain.
        batch_size: rows a step.
        sequence_length: tokens a row, into which conversations are packed.
        seed: of adapters, batches and of what DARE drops.
        run_dir: domains.json, domains.png, and a run folder a domain.
    """

    base: str = "smollm2"
    domains: tuple[Domain, ...] = DOMAINS
    rank: int = 8
    learning_rate: float = 1e-3
    steps: int = 40
    batch_size: int = 1
    sequence_length: int = 512
    seed: int = 0
    run_dir: str = "runs/domains"


def main(arguments: list[str]) -> None:
    """Parse, teach, judge, show."""
    import tyro

    from xylem.errors import ConfigError

    parsed = tyro.cli(Arguments, prog="domains.py", description=__doc__, args=arguments)
    if len(set(parsed.domains)) < 2:
        raise ConfigError("domains", " ".join(parsed.domains), f"at least two of {', '.join(DOMAINS)}")

    import sys

    from xylem.training.finetune import finetune
    from xylem.training.restore import open_model

    model = open_model(parsed.base)
    for domain in parsed.domains:
        config = run_of(parsed, domain, model)
        print(f"\n{domain}")
        if finetune(config, model.params, model.tokenizer, sys.argv)["step"] < parsed.steps:
            return print("stopped; the same command goes on")
    return show(parsed, judged(parsed, model))


def run_of(parsed: Arguments, domain: Domain, model: Any) -> FinetuneConfig:
    """The run that teaches a domain."""
    from xylem.data.config import DataConfig
    from xylem.peft.config import LoRAConfig
    from xylem.training.config import MeshConfig, OptimizerConfig
    from xylem.training.finetune_config import FinetuneConfig
    from xylem.training.objective_config import ObjectiveConfig

    warm = min(10, parsed.steps // 4)
    return FinetuneConfig(
        model=model.module.config,  # one compiled layer for all: unrolled, thirty take minutes to compile
        data=DataConfig(domain, tokenizer=model.data.tokenizer, sequence_length=parsed.sequence_length),
        optimizer=OptimizerConfig(learning_rate=parsed.learning_rate, warmup_steps=warm, weight_decay=0.0),
        objective=ObjectiveConfig("answers"),
        mesh=MeshConfig(data=1),  # a batch may be one row
        steps=parsed.steps,
        batch_size=parsed.batch_size,
        seed=parsed.seed,
        evaluate_every=0,
        save_every=10,
        sample_every=0,
        base=parsed.base,
        method=LoRAConfig(rank=parsed.rank, alpha=2.0 * parsed.rank),
        run_dir=str(Path(parsed.run_dir) / domain),
    )


def judged(parsed: Arguments, model: Any) -> dict[str, dict[str, Any]]:
    """Model by model its figures on each domain, kept in a file as they come."""
    import json

    from xylem.data import conversations
    from xylem.files import write_whole
    from xylem.peft import compose, saving
    from xylem.training.choices import judge
    from xylem.training.finetune import ADAPTER

    path, settings = Path(parsed.run_dir) / ROWS, settings_of(parsed)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    rows = kept["rows"] if kept.get("settings") == settings else {}  # those of other settings are judged anew
    vectors: dict[str, Any] = {}
    data = {name: conversations.prepare(run_of(parsed, name, model).data, model.tokenizer) for name in parsed.domains}
    for domain in parsed.domains:
        _, tuned = saving.load_adapter(Path(parsed.run_dir) / domain / ADAPTER, model.params)
        vectors[domain] = compose.difference(tuned, model.params)
    for name, make in mixtures(parsed, vectors).items():
        if name not in rows:
            params = compose.apply(model.params, make())
            rows[name] = {each: judge(model.module, params, data[each], parsed.batch_size) for each in parsed.domains}
            write_whole(path, json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
            print(name, *(f"{each} {row['loss']:.3f} {row['accuracy']:.1%}" for each, row in rows[name].items()))
    return rows


def settings_of(parsed: Arguments) -> dict[str, Any]:
    """What the figures depend on, as JSON has it."""
    from dataclasses import asdict

    return {**asdict(parsed), "domains": list(parsed.domains), "run_dir": None}


def mixtures(parsed: Arguments, vectors: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is added to the base in each row of the table."""
    import jax

    from xylem.peft import compose

    every, first = list(vectors.values()), next(iter(vectors))
    keys = jax.random.split(jax.random.key(parsed.seed), len(every))
    thinned = lambda: [compose.dare(one, key, 0.5) for one, key in zip(every, keys, strict=True)]  # noqa: E731
    return {
        "base": lambda: {},
        **{name: (lambda vector=vector: vector) for name, vector in vectors.items()},
        "mean": lambda: compose.add(every, [1 / len(every)] * len(every)),
        "sum": lambda: compose.add(every),
        "TIES, a fifth of each": lambda: compose.ties(every, density=0.2),
        "DARE, half of each, mean": lambda: compose.add(thinned(), [1 / len(every)] * len(every)),
        f"minus {first}": lambda: compose.negate(vectors[first]),
    }


def show(parsed: Arguments, rows: dict[str, dict[str, Any]]) -> None:
    """The table and the figure."""
    from rich.console import Console
    from rich.table import Table

    from xylem.training.plots import matrices

    folder = Path(parsed.run_dir)
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for domain in parsed.domains:
        table.add_column(f"{domain}: loss", justify="right")
        table.add_column("right", justify="right")
    for name, row in rows.items():
        cells = [(f"{row[domain]['loss']:.3f}", f"{row[domain]['accuracy']:.0%}") for domain in parsed.domains]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    console = Console()
    console.print(f"\n[bold]{parsed.base}, held-out questions, after {parsed.steps} steps a domain[/bold]")
    console.print(table)
    losses, shares = ({name: [row[d][of] for d in parsed.domains] for name, row in rows.items()}
                      for of in ("loss", "accuracy"))  # fmt: skip
    panels = {"held-out loss (nats a token of an answer)": losses, "right choices": shares}
    matrices(panels, parsed.domains, folder / "domains.png")
    print(f"{folder / ROWS}, {folder / 'domains.png'}")


if __name__ == "__main__":
    launch(main)
