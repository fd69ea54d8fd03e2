"""Every method of xylem/peft on one task: what each learns, costs and takes, as one table and one figure.

    python scripts/compare_methods.py --run-dir runs/methods
    python scripts/compare_methods.py --methods lora qlora prefix --steps 60

All begin with the same model, read the same conversations in the same order, and are judged by the same held-out
answers; each has a learning rate that suits it. Every method has a process of its own, whose memory is measured, and a
run folder below --run-dir, which scripts/generate.py opens. What is done is not done again; stopped, the same command
goes on. A step is timed apart from the run (--parts speed), which wants a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from xylem.launch import launch
from xylem.peft import config as peft
from xylem.training.paired import loss_of, over, spread

Part = Literal["learn", "speed"]
Name = Literal[
    *("base", "full", "child", "last", "norms", "bitfit", "prompt", "prefix", "ia3", "houlsby", "pfeiffer"),
    *("lora", "rslora", "dora", "adalora", "relora", "qlora"),
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)
WARM, TIMED = 2, 8  # steps before the clock is read, and steps by it
TABLE = "methods"  # the section of a page that --page names

# What each is, and its learning rate, by rules of thumb and no search: weights of the network itself take small steps,
# grafts that begin as nothing take large ones, and the fewer numbers there are the larger.
METHODS: dict[str, tuple[Any, float]] = {
    "full": (peft.SelectionConfig(targets="."), 5e-5),
    "child": (peft.ChildConfig(), 1e-4),
    "last": (peft.SelectionConfig(last=4), 2e-4),
    "norms": (peft.SelectionConfig(targets="norm/"), 5e-3),
    "bitfit": (peft.BitFitConfig(missing="add"), 5e-3),
    "prompt": (peft.PromptConfig(), 2e-2),
    "prefix": (peft.PrefixConfig(), 2e-3),
    "ia3": (peft.IA3Config(), 2e-2),
    "houlsby": (peft.AdapterConfig(), 2e-3),
    "pfeiffer": (peft.AdapterConfig(places="mlp"), 2e-3),
    "lora": (peft.LoRAConfig(), 1e-3),
    "rslora": (peft.LoRAConfig(scaling="stabilized"), 5e-4),
    "dora": (peft.DoRAConfig(), 1e-3),
    "adalora": (peft.AdaLoRAConfig(), 2e-3),
    "relora": (peft.ReLoRAConfig(every=12, rewarm=2, prune=0.9), 1e-3),
    "qlora": (peft.QLoRAConfig(), 1e-3),
}
TITLES = {
    "base": "the base, untouched",
    "full": "all weights",
    "child": "Child-tuning, random",
    "last": "last four layers",
    "norms": "norms",
    "bitfit": "BitFit, biases added",
    "prompt": "prompt tuning, 20",
    "prefix": "prefix tuning, 20",
    "ia3": "(IA)3",
    "houlsby": "adapters, Houlsby",
    "pfeiffer": "adapters, Pfeiffer",
    "lora": "LoRA, rank 8",
    "rslora": "rsLoRA, rank 8",
    "dora": "DoRA, rank 8",
    "adalora": "AdaLoRA, 12 to 8",
    "relora": "ReLoRA, rank 8 twice",
    "qlora": "QLoRA, NF4, rank 8",
}


@dataclass(frozen=True)
class Arguments:
    """What to compare.

    Attributes:
        methods: which, in this order; the base is always judged too.
        base: the model they begin with, as scripts/finetune.py takes it.
        corpus: conversations, as its --data.corpus.
        sequence_length: tokens a row.
        batch_size: rows a step.
        steps: of each method.
        seed: of what is drawn, and of the order of the rows.
        parts: learn and judge, time a step, or both.
        run_dir: methods.json, methods.png, and a run folder a method.
        page: a Markdown file whose section between the comments methods:begin and methods:end becomes the table.
        only: do this part of this method in this process, and nothing else.
    """

    methods: tuple[Name, ...] = NAMES
    base: str = "smollm2"
    corpus: str = "trivia"
    sequence_length: int = 256
    batch_size: int = 1
    steps: int = 24
    seed: int = 0
    parts: tuple[Part, ...] = ("learn", "speed")
    run_dir: str = "runs/methods"
    page: str | None = None
    only: Annotated[tuple[Name, Part] | None, tyro.conf.arg(help_behavior_hint="(each in its own process)")] = None


def main(arguments: list[str]) -> None:
    """Parse; do one part of one method, or have each done and show them all."""
    parsed = tyro.cli(Arguments, prog="compare_methods.py", description=__doc__, args=arguments)
    if parsed.only:
        return work(parsed, *parsed.only)

    import contextlib
    import subprocess
    import sys
    import time

    from xylem.errors import Failure

    check(parsed)
    tasks = [(name, part) for part in parsed.parts for name in names_of(parsed) if (name, part) != ("base", "speed")]
    missing = [task for task in tasks if found(parsed, *task) is None]
    begun = time.monotonic()
    for place, (name, part) in enumerate(missing):
        left = (
            f", about {(time.monotonic() - begun) / place * (len(missing) - place) / 60:.0f} min left" if place else ""
        )
        print(f"\n[{place + 1} of {len(missing)}{left}] {TITLES[name]}: {part}", flush=True)
        child = subprocess.Popen([sys.executable, __file__, *arguments, "--only", name, part])
        while child.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):  # the method hears of it too, and saves
                child.wait()
        if ended := child.returncode:
            raise Failure(f"method {name} ended with code {ended}; those before it are kept")
        if found(parsed, name, part) is None:
            return print("stopped; the same command goes on")
    show(parsed)


def check(parsed: Arguments) -> None:
    """Raise ConfigError where a flag cannot work."""
    from xylem.errors import ConfigError
    from xylem.files import section

    for name in ("sequence_length", "batch_size", "steps"):
        if getattr(parsed, name) < 1:
            raise ConfigError(name, getattr(parsed, name), "it must be at least 1")
    if not parsed.parts:
        raise ConfigError("parts", "", "learn, speed, or both")
    if parsed.page is not None:
        section(parsed.page, TABLE)


def names_of(parsed: Arguments) -> tuple[Name, ...]:
    """The base, and the methods that are asked for."""
    return ("base", *(name for name in parsed.methods if name != "base"))


def settings_of(parsed: Arguments, name: str) -> dict[str, Any]:
    """What the figures of a method come from, as JSON holds it."""
    import json
    from dataclasses import asdict

    every = ("methods", "parts", "run_dir", "page", "only")
    common = {field: value for field, value in asdict(parsed).items() if field not in every}
    if name == "base":
        return {field: common[field] for field in ("base", "corpus", "sequence_length")}
    config, rate = METHODS[name]
    return json.loads(json.dumps({**common, "method": asdict(config), "learning_rate": rate}))


def found(parsed: Arguments, name: str, part: str) -> dict[str, Any] | None:
    """The figures of a method, where they are there; ConfigError where they are of other settings."""
    import json

    from xylem.errors import ConfigError

    path = Path(parsed.run_dir) / name / f"{part}.json"
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    if kept["settings"] != settings_of(parsed, name):
        allowed = f"its {name} was made with {kept['settings']}: name another folder, or remove that one"
        raise ConfigError("run_dir", parsed.run_dir, allowed)
    return kept


def work(parsed: Arguments, name: Name, part: Part) -> None:
    """Do one part of one method and keep its figures in its run folder."""
    import json

    from xylem.files import write_whole
    from xylem.training.restore import open_model

    model = open_model(parsed.base)
    made = judged(parsed, model) if name == "base" else (learned if part == "learn" else timed)(parsed, name, model)
    if made is not None:
        path = Path(parsed.run_dir) / name / f"{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"name": name, "settings": settings_of(parsed, name), **made}) + "\n")


def run_of(parsed: Arguments, name: str, model: Any) -> Any:
    """The run of a method. The layers of a network of which little learns are compiled once, not each for itself: a run
    of minutes would spend them on that."""
    from xylem.data.config import DataConfig
    from xylem.training.config import MeshConfig, OptimizerConfig
    from xylem.training.finetune_config import FinetuneConfig
    from xylem.training.objective_config import ObjectiveConfig

    method, rate = METHODS[name]
    return FinetuneConfig(
        model=model.module.config,
        data=DataConfig(parsed.corpus, tokenizer=model.data.tokenizer, sequence_length=parsed.sequence_length),
        objective=ObjectiveConfig("answers"),
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=min(4, parsed.steps - 1), weight_decay=0.0),
        mesh=MeshConfig(data=1),
        base=parsed.base,
        method=method,
        steps=parsed.steps,
        batch_size=parsed.batch_size,
        seed=parsed.seed,
        log_every=1,
        evaluate_every=0,
        save_every=0,
        sample_every=0,
        keep=1,
        run_dir=str(Path(parsed.run_dir) / name),
    )


def learned(parsed: Arguments, name: str, model: Any) -> dict[str, Any] | None:
    """Train a method: its numbers, its file, the memory of this process until then, and the held-out answers."""
    import resource
    import sys

    from xylem.peft import tree
    from xylem.training.checkpoint import load_params
    from xylem.training.finetune import ADAPTER, finetune
    from xylem.training.restore import open_model

    config = run_of(parsed, name, model)
    summary = finetune(config, model.params, model.tokenizer, sys.argv)
    if "validation_loss" not in summary:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held, _ = load_params(config.run_dir, entries=("trainable",))
    file = Path(config.run_dir) / ADAPTER / "adapter.safetensors"
    sizes = {"parameters": tree.count(held), "file": file.stat().st_size, "memory": memory}
    return {**sizes, **judged(parsed, open_model(config.run_dir))}


def judged(parsed: Arguments, model: Any) -> dict[str, Any]:
    """The negative log-likelihood of each held-out answer, in nats, and its number of tokens."""
    from functools import partial

    import jax
    import numpy as np

    from xylem.data import conversations, pipeline
    from xylem.data.config import DataConfig, cache_root
    from xylem.launch import settle_jax

    settle_jax(cache_root() / "xla")
    wanted = DataConfig(parsed.corpus, tokenizer=model.data.tokenizer, sequence_length=parsed.sequence_length)
    data = conversations.prepare(wanted, model.tokenizer)
    most = max(int(row["segments"].max()) for row in data.source("validation"))
    answers = jax.jit(partial(by_conversation, model.module, most=most))
    batches = pipeline.eval_batches(data, "validation", parsed.batch_size)
    sums = np.concatenate([np.asarray(answers(model.params, batch)).reshape(-1, 2) for batch in batches])
    sums = sums[sums[:, 1] > 0]
    return {"nll": sums[:, 0].tolist(), "tokens": sums[:, 1].tolist()}


def by_conversation(module: Any, params: Any, batch: Mapping[str, Any], most: int) -> Any:
    """Of each of the ``most`` conversations that a row may hold: the negative log-likelihood of the assistant's tokens
    and their number; (B, most, 2), zeros where there is none."""
    import jax
    import jax.numpy as jnp

    from xylem.training.objectives import forward

    out = forward(module, params, dict(batch), None)
    scores = jax.nn.log_softmax(module.head(module.head_params(params), out.hidden))
    nll = -jnp.take_along_axis(scores, batch["labels"][..., None], axis=-1)[..., 0] * batch["weights"]
    whose = jax.nn.one_hot(batch["segments"] - 1, most)  # padding, 0, is nobody's
    return jnp.einsum("bts,btn->bsn", whose, jnp.stack([nll, batch["weights"]], axis=-1))


def timed(parsed: Arguments, name: str, model: Any) -> dict[str, Any]:
    """Seconds of each of a few steps, after some that are not counted."""
    import time

    import jax

    from xylem.data import conversations, pipeline
    from xylem.data.config import cache_root
    from xylem.launch import settle_jax
    from xylem.sharding import make_mesh
    from xylem.training.finetune import start_of
    from xylem.training.program import assemble

    settle_jax(cache_root() / "xla")
    config = run_of(parsed, name, model)
    data, mesh, seconds = conversations.prepare(config.data, model.tokenizer), make_mesh(data=1), []
    with jax.set_mesh(mesh):
        program = assemble(config, mesh, start_of(config, model.params, data))
        state, batches = program.start(), pipeline.TrainIterator(data, config.batch_size, config.seed)
        for _ in range(WARM + TIMED):
            begun, batch = time.perf_counter(), next(batches)
            state, told = program.step(state, batch)
            jax.block_until_ready((state, told))
            seconds.append(time.perf_counter() - begun)
    print(f"{name}: {min(seconds[WARM:]):.2f} to {max(seconds[WARM:]):.2f} s a step", flush=True)
    return {"seconds": seconds[WARM:]}


def figures_of(parsed: Arguments) -> list[dict[str, Any]]:
    """What is known of each method, ready to be shown. Losses are compared answer by answer, for these differ much more
    than the methods do: gained over the base, and behind the best method."""
    import statistics

    kept = {name: found(parsed, name, "learn") for name in names_of(parsed)}
    learn = {name: row for name, row in kept.items() if row is not None}
    if "base" not in learn:
        return []
    best = min(learn.values(), key=loss_of)
    rows = []
    for name, row in learn.items():
        speed = found(parsed, name, "speed")
        made = {"name": name, "title": TITLES[name], "loss": loss_of(row)}
        made["loss_error"] = spread(row["nll"], row["tokens"])
        made["gain"], made["gain_error"] = over(learn["base"], row)
        made["behind"], made["behind_error"] = over(row, best)
        made |= {key: row.get(key, 0) for key in ("parameters", "file", "memory")}
        made["learning_rate"] = METHODS[name][1] if name in METHODS else None
        made["seconds"] = statistics.median(speed["seconds"]) if speed else None
        rows.append(made)
    return rows


HEADINGS = (
    *("method", "learns", "rate", "file, MB", "memory, GB", "s a step"),
    *("held-out loss", "gained", "behind the best"),
)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    loss = f"{row['loss']:.2f} ± {row['loss_error']:.2f}"
    if row["name"] == "base":
        return (row["title"], *["-"] * 5, loss, "-", "-")
    seconds = f"{row['seconds']:.2f}" if row["seconds"] else "not timed"
    made = (row["title"], f"{row['parameters']:,}", f"{row['learning_rate']:g}", f"{row['file'] / 1e6:.2f}")
    gained = f"{row['gain']:.2f} ± {row['gain_error']:.2f}"
    behind = f"{row['behind']:.2f} ± {row['behind_error']:.2f}" if row["behind"] else "best"
    return (*made, f"{row['memory'] / 1e9:.2f}", seconds, loss, gained, behind)


def show(parsed: Arguments) -> None:
    """The table and the figure of all methods, and the table in the page that was named."""
    import json

    from rich.console import Console
    from rich.table import Table

    from xylem.files import replace_section, write_whole
    from xylem.training.plots import method_points

    folder, rows = Path(parsed.run_dir), figures_of(parsed)
    if not rows:
        return print("nothing has learned yet: --parts learn")
    table = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console = Console(width=max(130, Console().width))
    console.print(f"\n[bold]{parsed.base} on {parsed.corpus} after {told(parsed)}[/bold]")
    console.print(table)
    write_whole(folder / "methods.json", json.dumps(rows, indent=2) + "\n")
    method_points(rows, folder / "methods.png")
    print(f"{folder / 'methods.json'}, {folder / 'methods.png'}")
    if parsed.page is not None:
        rule = ["---", *["---:"] * (len(HEADINGS) - 1)]
        lines = [f"| {' | '.join(line)} |" for line in (HEADINGS, rule, *map(cells, rows))]
        replace_section(parsed.page, TABLE, "\n".join(lines))
        print(parsed.page)


def told(parsed: Arguments) -> str:
    """How much each method reads."""
    tokens = parsed.steps * parsed.batch_size * parsed.sequence_length
    return f"{parsed.steps} steps, {tokens:,} tokens"


if __name__ == "__main__":
    launch(main)
