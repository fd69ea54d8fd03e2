"""Fit a scaling law to many small runs, and tell how to spend a larger budget.

    python scripts/scaling.py [PRESET] --sizes 16x2 32x2 64x3 --flops 1e11 3e11 --budget 1e15 --run-dir DIR ...

PRESET is a run of xylem/configs/pretrain.py, of which --sizes make smaller or larger ones, as WIDTHxLAYERS, on a small
vocabulary; every field of it is a flag but steps, which the budgets (--flops, 6 N D each) decide. Started several times
on one folder, on one machine or several that share it, the processes share the runs; stopped, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from xylem.launch import launch
from xylem.models.config import TransformerConfig
from xylem.training.config import RunConfig


@dataclass(frozen=True)
class Arguments:
    """What to train, and what to ask of the law.

    Attributes:
        sizes: WIDTHxLAYERS of each model; widths are multiples of 16.
        flops: budgets of the sweep, FLOPs: every size is trained as long as each of them pays for.
        budget: FLOPs to spend well; ten times the largest of the sweep where not given.
        epochs: a run that would read the training text more often than this is left out.
        train: train what is missing; else fit what is there.
        samples: bootstrap draws behind the intervals.
        level: share of the draws that lies within an interval.
        plot: draw scaling.png beside scaling.json.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    sizes: tuple[str, ...] = ("16x2", "32x2", "48x2", "64x2", "96x3", "128x4")
    flops: tuple[float, ...] = (5e10, 1.5e11, 5e11, 1.5e12)
    budget: float | None = None
    epochs: float = 1.0
    train: bool = True
    samples: int = 200
    level: float = 0.9
    plot: bool = True


def quick(run: RunConfig) -> Arguments:
    """A run as the base of a sweep that two cores finish in minutes: few tokens a step, a vocabulary that small models
    can afford, nothing read or written between the first step and the last."""
    never = dict.fromkeys(("evaluate_every", "save_every", "sample_every"), 0)
    run = replace(run, batch_size=8, log_every=100, keep=1, run_dir="runs/scaling", **never)
    if not isinstance(run.model, TransformerConfig):
        return Arguments(run)  # which has no sizes: told when the sweep is planned
    data = replace(run.data, tokenizer="bpe:512", sequence_length=128)
    compute = replace(run.model.compute, layers="scan")  # compiling costs these runs more than their steps
    model = replace(run.model, vocab_size=512, max_length=128, compute=compute)
    return Arguments(replace(run, model=model, data=data))


def main(arguments: list[str]) -> None:
    """Parse, train, fit, print."""
    import sys

    from xylem.configs.pretrain import parse

    _, parsed = parse(arguments, "scaling.py", str(__doc__), around=quick)
    check(parsed)

    import json
    from pathlib import Path

    from xylem.files import write_whole
    from xylem.launch import settle_jax
    from xylem.training import sweep
    from xylem.training.plots import scaling_curves

    settle_jax()
    runs = sweep.planned(parsed.run, parsed.sizes, parsed.flops, parsed.epochs)
    if parsed.train:
        sweep.train(runs, sys.argv, print)
    rows = [{"run": run.name, "flops": run.flops, "N": run.N, "D": run.D, "loss": sweep.reached(run)} for run in runs]
    budget = parsed.budget or 10 * max(run.flops for run in runs)
    found = findings([row for row in rows if row["loss"] is not None], budget, parsed)
    show(found)
    folder = Path(parsed.run.run_dir)
    write_whole(folder / "scaling.json", json.dumps(found, indent=2) + "\n")
    if parsed.plot:
        scaling_curves(found, folder / "scaling.png")
    print(f"{folder / 'scaling.json'}" + (f", {folder / 'scaling.png'}" if parsed.plot else ""))


def check(parsed: Arguments) -> None:
    """Raise ConfigError where a flag of the law cannot work, before anything is trained."""
    from xylem.errors import ConfigError

    if parsed.budget is not None and not 0.0 < parsed.budget < float("inf"):
        raise ConfigError("budget", parsed.budget, "a positive number of FLOPs")
    if not 0.0 < parsed.level < 1.0:
        raise ConfigError("level", parsed.level, "it must lie between 0 and 1")
    for name in ("epochs", "samples"):
        if not getattr(parsed, name) > 0:
            raise ConfigError(name, getattr(parsed, name), "it must be positive")


def findings(rows: list[dict[str, Any]], budget: float, parsed: Arguments) -> dict[str, Any]:
    """The law of some runs, what it says of ``budget``, and the minimum at each budget of the sweep; as JSON holds."""
    from dataclasses import asdict

    import numpy as np

    from xylem.training import scaling

    N, D, loss = (np.array([row[name] for row in rows], np.float64) for name in ("N", "D", "loss"))
    law = scaling.fit(N, D, loss)
    laws = scaling.bootstrap(N, D, loss, law, parsed.samples, parsed.run.seed)
    within = lambda values: scaling.interval(list(values), parsed.level)  # noqa: E731
    falling = [each for each in laws if each.alpha > 0 and each.beta > 0]  # the others have no optimum
    best, others = scaling.optimal(law, budget), [scaling.optimal(each, budget) for each in falling]
    valleys = []
    for flops in sorted({row["flops"] for row in rows}):
        same = np.array([row["flops"] == flops for row in rows])
        valley = scaling.parabola(N[same], loss[same])
        valleys.append({"flops": flops, "parabola": valley and valley._asdict()})
    return {
        "runs": [row | {"law": float(law(row["N"], row["D"]))} for row in rows],
        "law": asdict(law),
        "intervals": {name: within(getattr(each, name) for each in laws) for name in asdict(law)},
        "budget": budget,
        "optimum": best._asdict(),
        "optimum_intervals": {name: within(getattr(each, name) for each in others) for name in best._fields},
        "draws": {"level": parsed.level, "samples": len(laws), "with_an_optimum": len(others)},
        "isoflop": valleys,
    }


def show(found: dict[str, Any]) -> None:
    """The runs, the law and the optimum as tables."""
    from rich.console import Console
    from rich.table import Table

    def table(*names: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for name in names:
            made.add_column(name, justify="left" if name in ("", "run") else "right")
        return made

    runs = table("run", "N", "D", "D / N", "loss", "law", "error")
    for row in found["runs"]:
        error = f"{row['loss'] / row['law'] - 1:+.2%}"
        figures = f"{row['N']:,}", f"{row['D']:,}", f"{row['D'] / row['N']:.1f}", f"{row['loss']:.4f}"
        runs.add_row(row["run"], *figures, f"{row['law']:.4f}", error)
    level = f"{found['draws']['level']:.0%} of draws"
    law = table("", "fit", level)
    for name, value in found["law"].items():
        law.add_row(name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*found["intervals"][name]))
    best = table("", "best", level)
    for name, value in found["optimum"].items():
        best.add_row(name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*found["optimum_intervals"][name]))
    valleys = table("FLOPs", "N", "loss")
    for row in found["isoflop"]:
        at = row["parabola"]
        valleys.add_row(f"{row['flops']:.3g}", *((f"{at['N']:,.0f}", f"{at['bottom']:.4f}") if at else ("none", "")))
    tables = {
        f"{len(found['runs'])} runs": runs,
        "L(N, D) = E + A / N^alpha + B / D^beta": law,
        f"compute-optimal at {found['budget']:.3g} FLOPs": best,
        "least loss at each budget, by parabolas": valleys,
    }
    console = Console()
    for title, each in tables.items():
        console.print(f"\n[bold]{title}[/bold]")
        console.print(each)


if __name__ == "__main__":
    launch(main)
