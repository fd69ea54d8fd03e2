"""Language models from counting to Mamba on the same text: one table, one figure.

    python scripts/ladder.py --documents 240 --run-dir runs/ladder     # half an hour on two cores
    python scripts/ladder.py --rungs lstm llama --data.corpus my_texts/

Each rung has about as many parameters and reads each token of the training text once, in the same windows: an n-gram
model, an RNN, an LSTM, GPT-2, LLaMA and Mamba; Muon trains all that learn. Every rung has a process of its own, whose
memory is measured, and a run folder below --run-dir, which scripts/generate.py opens. What is done is not done again;
stopped, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from xylem.data.config import DataConfig
from xylem.launch import launch

if TYPE_CHECKING:
    from xylem.data.pipeline import Prepared
    from xylem.training.config import RunConfig

Rung = Literal["ngram", "rnn", "lstm", "gpt2", "llama", "mamba"]
RUNGS: tuple[Rung, ...] = ("ngram", "rnn", "lstm", "gpt2", "llama", "mamba")
RESULT = "rung.json"
POINTS = 8  # of each curve, each on the whole of the validation text
# An RNN at 2e-2 falls apart halfway; the gates of an LSTM hardly move at 1e-2.
RATES = {"rnn": 1e-2, "lstm": 4e-2, "gpt2": 1e-2, "llama": 1e-2, "mamba": 1e-2}


@dataclass(frozen=True)
class Arguments:
    """What to climb.

    Attributes:
        rungs: which models, in this order.
        data: the text, the tokenizer and the window length of all of them.
        documents: read the first so many documents of the training text alone; all of them where not given.
        batch_size: windows a step.
        width: of the 4-layer Transformers; the others' sizes follow from it.
        run_dir: ladder.json, ladder.png, and a run folder a rung.
        only: do this rung in this process, and nothing else.
    """

    rungs: tuple[Rung, ...] = RUNGS
    data: DataConfig = field(default_factory=DataConfig)
    documents: int | None = None
    batch_size: int = 16
    width: int = 256
    run_dir: str = "runs/ladder"
    only: Annotated[Rung | None, tyro.conf.arg(help_behavior_hint="(each in a process of its own)")] = None


def main(arguments: list[str]) -> None:
    """Parse; do one rung, or have each done and show them all."""
    parsed = tyro.cli(Arguments, prog="ladder.py", description=__doc__, args=arguments)
    check(parsed)
    if parsed.only:
        return climb(parsed, parsed.only)

    import contextlib
    import subprocess
    import sys

    from xylem.errors import Failure

    missing = [rung for rung in parsed.rungs if not climbed(parsed, rung)]
    if parsed.documents and missing:
        keep_beginning(parsed)
    for rung in missing:
        print(f"\n{rung}")
        child = subprocess.Popen([sys.executable, __file__, *arguments, "--only", rung])
        while child.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):  # the rung hears of it too, and saves
                child.wait()
        if ended := child.returncode:
            raise Failure(f"rung {rung} ended with code {ended}; those before it are kept")
        if not (Path(parsed.run_dir) / rung / RESULT).is_file():
            return print("stopped; the same command goes on")
    return show(parsed)


def settings_of(parsed: Arguments) -> dict[str, Any]:
    """What all rungs of a folder have in common, as JSON holds it."""
    from dataclasses import asdict

    return {name: value for name, value in asdict(parsed).items() if name not in ("rungs", "run_dir", "only")}


def climbed(parsed: Arguments, rung: str) -> bool:
    """Whether a rung's figures are there; ConfigError where they are of another text or size."""
    import json

    from xylem.errors import ConfigError

    path = Path(parsed.run_dir) / rung / RESULT
    if not path.is_file():
        return False
    if (there := json.loads(path.read_text())["settings"]) != settings_of(parsed):
        raise ConfigError("run_dir", parsed.run_dir, f"its rung {rung} was climbed with {there}: name another folder")
    return True


def check(parsed: Arguments) -> None:
    """Raise ConfigError where a flag cannot work."""
    from xylem.errors import ConfigError

    if parsed.width < 32 or parsed.width % 32:
        raise ConfigError("width", parsed.width, "a multiple of 32: the Transformers have 4 heads of whole pairs")
    for name in ("batch_size", "documents"):
        if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
            raise ConfigError(name, getattr(parsed, name), "it must be at least 1")
    if not parsed.rungs:
        raise ConfigError("rungs", "", f"some of {', '.join(RUNGS)}")


def text_of(parsed: Arguments) -> DataConfig:
    """The text that is read: the data asked for, or its beginning as ``keep_beginning`` has written it."""
    from dataclasses import replace

    if parsed.documents is None:
        return parsed.data
    files = {split: str(Path(parsed.run_dir) / f"{split}.jsonl") for split in ("train", "validation")}
    return replace(parsed.data, corpus=files["train"], validation=files["validation"], text_field="text")


def keep_beginning(parsed: Arguments) -> None:
    """Write the first documents of the training text, and all to validate on, as files of their own."""
    import itertools
    import json

    from xylem.data.corpora import open_corpus
    from xylem.files import write_whole

    splits, text = open_corpus(parsed.data, print).splits, text_of(parsed)
    Path(parsed.run_dir).mkdir(parents=True, exist_ok=True)
    for split, file, most in (("train", text.corpus, parsed.documents), ("validation", str(text.validation), None)):
        documents = itertools.islice(splits[split](), most)
        write_whole(file, "".join(json.dumps({"text": document}) + "\n" for document in documents))


def climb(parsed: Arguments, rung: Rung) -> None:
    """Do one rung and keep its figures in its run folder."""
    import json
    import resource
    import sys

    from xylem.data import pipeline
    from xylem.files import write_whole

    data = pipeline.prepare(text_of(parsed))
    found = counted(parsed, data) if rung == "ngram" else trained(run_of(rung, parsed, data))
    if found is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {"rung": rung, "settings": settings_of(parsed), **found, "memory": memory}
        write_whole(Path(parsed.run_dir) / rung / RESULT, json.dumps(found, indent=2) + "\n")


def run_of(rung: Rung, parsed: Arguments, data: Prepared) -> RunConfig:
    """The run of a rung that learns: one pass over the text."""
    import sys
    from dataclasses import replace

    from xylem.configs.pretrain import default
    from xylem.models.gpt import gpt
    from xylem.models.llama import llama
    from xylem.models.mamba import mamba
    from xylem.models.rnn import recurrent
    from xylem.training.objective_config import ObjectiveConfig

    width, length = parsed.width, parsed.data.sequence_length
    sizes: dict[str, Any] = {"vocab_size": data.tokenizer.vocab_size, "max_length": length}
    model = {
        # Output matrices of their own: the recurrent ones are narrower for it, or wider for their cheaper layers.
        "rnn": lambda: recurrent("rnn", 2, width * 13 // 8, **sizes),
        "lstm": lambda: recurrent("lstm", 2, width * 5 // 4, **sizes),
        "gpt2": lambda: gpt(4, width, 4, **sizes),
        "llama": lambda: llama(4, width, 4, 4, width * 11 // 4, rope_theta=1e4, norm_eps=1e-5, head="tied", **sizes),
        "mamba": lambda: mamba(7, width, **sizes),
    }[rung]()
    steps, base = max(1, data.counts["train"]["windows"] // parsed.batch_size), default()
    return replace(
        base,
        model=model,
        data=text_of(parsed),
        optimizer=replace(base.optimizer, learning_rate=RATES[rung]),
        objective=ObjectiveConfig("truncated" if rung in ("rnn", "lstm") else "causal_lm"),
        steps=steps,
        batch_size=parsed.batch_size,
        evaluate_every=max(1, steps // POINTS),
        evaluate_batches=sys.maxsize,
        sample_every=0,
        run_dir=str(Path(parsed.run_dir) / rung),
    )


def trained(config: RunConfig) -> dict[str, Any] | None:
    """The figures of a run that learns; None where it was stopped."""
    import json
    import sys

    from xylem.training.loop import pretrain
    from xylem.training.run_folder import METRICS

    summary = pretrain(config, sys.argv)
    if "validation_bits_per_byte" not in summary:
        return None
    lines = (Path(config.run_dir) / METRICS).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    on_the_way = [row for row in rows[:-1] if "validation_bits_per_byte" in row]
    return {
        "parameters": parameters(config),
        "tokens": rows[-1]["tokens"],
        "bits_per_byte": summary["validation_bits_per_byte"],
        "perplexity": summary["validation_perplexity"],
        # The rate forgets within a minute: its peak is that of a machine with nothing else to do.
        "tokens_per_second": max(row["tokens_per_second"] for row in rows),
        "curve": [[row["tokens"], row["validation_bits_per_byte"]] for row in on_the_way],
    }


def parameters(config: RunConfig) -> int:
    """How many numbers a model learns."""
    import jax
    import jax.numpy as jnp

    from xylem import models
    from xylem.peft import tree

    init = models.build(config.model).init
    return tree.count(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


def counted(parsed: Arguments, data: Prepared) -> dict[str, Any]:
    """The figures of the n-gram model, whose curve is that of models of ever longer beginnings of the text."""
    import sys

    from xylem.models import ngram
    from xylem.training.counting import count
    from xylem.training.counting_config import CountingConfig
    from xylem.training.evaluate import counted_figures

    config = CountingConfig(data=text_of(parsed), run_dir=str(Path(parsed.run_dir) / "ngram"))
    summary = count(config, sys.argv)
    model, curve = config.model(data.tokenizer.vocab_size, data.tokenizer.end_of_text), []
    every = data.documents("train")
    for number in range(1, POINTS):
        documents = every[: max(1, len(every) * number // POINTS)]
        bits = counted_figures(model, ngram.count(documents, model), data, "validation")["bits_per_byte"]
        curve.append([sum(map(len, documents)) + len(documents), bits])
    return {
        **{name: summary[name] for name in ("parameters", "tokens_per_second")},
        "tokens": (tokens := data.counts["train"]["tokens"]),
        "bits_per_byte": (bits := summary["validation_bits_per_byte"]),
        "perplexity": summary["validation_perplexity"],
        "curve": [*curve, [tokens, bits]],
    }


def show(parsed: Arguments) -> None:
    """The table and the figure of all rungs."""
    import json

    from rich.console import Console
    from rich.table import Table

    from xylem.files import write_whole
    from xylem.training.plots import ladder_curves

    folder = Path(parsed.run_dir)
    rows = [json.loads((folder / rung / RESULT).read_text()) for rung in parsed.rungs]
    table = Table(box=None, pad_edge=False)
    for name in ("", "parameters", "bits per byte", "perplexity", "tokens/s", "memory, GB"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        quality = f"{row['parameters']:,}", f"{row['bits_per_byte']:.3f}", f"{row['perplexity']:.1f}"
        table.add_row(row["rung"], *quality, f"{row['tokens_per_second']:,.0f}", f"{row['memory'] / 1e9:.2f}")
    console = Console()
    console.print(f"\n[bold]{parsed.data.corpus}, validation, after {rows[0]['tokens']:,} tokens[/bold]")
    console.print(table)
    write_whole(folder / "ladder.json", json.dumps(rows, indent=2) + "\n")
    ladder_curves(rows, folder / "ladder.png")
    print(f"{folder / 'ladder.json'}, {folder / 'ladder.png'}")


if __name__ == "__main__":
    launch(main)
