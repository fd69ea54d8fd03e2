"""How far back in time a gradient reaches in an RNN, an LSTM and a GRU: at birth, and after a short training.

    python scripts/gradient_flow.py --steps 300 --out runs/gradient_flow
    python scripts/gradient_flow.py --checkpoint RUN_FOLDER

What is measured is the derivative of a layer's last state by its state k steps before, as the model reads real text
(xylem/models/cells.py, gradient_flow). A run folder of a recurrent model is measured as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from xylem.data.config import DataConfig
from xylem.launch import launch

if TYPE_CHECKING:
    from xylem.data.pipeline import Prepared
    from xylem.models.recurrent import RecurrentLM


@dataclass(frozen=True)
class Arguments:
    """What to measure.

    Attributes:
        checkpoint: a run folder of a recurrent model; else models are made and trained here.
        cells: which models are made.
        d_model: their width.
        forget_bias: where the forget gates of an LSTM start, one model each.
        num_layers: their depth; the last layer is measured.
        steps: of training; 0 measures at birth alone.
        batch_size: sequences a step.
        learning_rate: the peak of AdamW's.
        texts: stretches of validation text that are read.
        seed: of weights and batches.
        out: folder of gradient_flow.png and gradient_flow.json.
        data: the text; its sequence_length is how far back is looked, and how long a training sequence is.
    """

    checkpoint: str | None = None
    cells: tuple[Literal["rnn", "gru", "lstm"], ...] = ("rnn", "gru", "lstm")
    d_model: int = 128
    forget_bias: tuple[float, ...] = (1.0, 5.0)
    num_layers: int = 1
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 3e-3
    texts: int = 8
    seed: int = 0
    out: str = "runs/gradient_flow"
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer="bpe:512", sequence_length=128))


def main(arguments: list[str]) -> None:
    """Parse, measure, print."""
    import tyro

    from xylem.errors import ConfigError

    parsed = tyro.cli(Arguments, prog="gradient_flow.py", description=__doc__, args=arguments)
    for name, least in {"d_model": 1, "num_layers": 1, "steps": 0, "batch_size": 1, "texts": 1, "seed": 0}.items():
        if getattr(parsed, name) < least:
            raise ConfigError(name, getattr(parsed, name), f"it must be at least {least}")

    import json
    from pathlib import Path

    from xylem.data.config import cache_root
    from xylem.files import write_whole
    from xylem.launch import settle_jax
    from xylem.training.plots import gradient_curves

    settle_jax(cache_root(parsed.data.cache_dir) / "xla")
    found = {"flow": of_checkpoint(parsed) if parsed.checkpoint else of_new_models(parsed)}
    show(found["flow"])
    folder = Path(parsed.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "gradient_flow.json", json.dumps(found, indent=2) + "\n")
    gradient_curves(found, folder / "gradient_flow.png")
    print(f"{folder / 'gradient_flow.json'}, {folder / 'gradient_flow.png'}")


def of_checkpoint(parsed: Arguments) -> dict[str, Any]:
    """The flow through a trained run's model, reading its own validation text."""
    from xylem.data import pipeline
    from xylem.errors import ConfigError
    from xylem.models.recurrent import RecurrentLM
    from xylem.training.restore import open_model

    module, params, _, data, *_ = open_model(str(parsed.checkpoint))
    if not isinstance(module, RecurrentLM):
        allowed = f"a recurrent model is wanted, this is a {module.config.family} model"
        raise ConfigError("checkpoint", parsed.checkpoint, allowed)
    return {"as trained": {module.config.cell: flow(module, params, pipeline.prepare(data), parsed.texts)}}


def of_new_models(parsed: Arguments) -> dict[str, Any]:
    """The flow through new models, before and after training."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from xylem.data import pipeline
    from xylem.models.recurrent import RecurrentLM
    from xylem.models.rnn import recurrent

    data = pipeline.prepare(parsed.data)
    born, grown = {}, {}
    vocab, length = data.tokenizer.vocab_size, parsed.data.sequence_length
    configs = {cell: recurrent(cell, parsed.num_layers, parsed.d_model, vocab, length) for cell in parsed.cells}
    if (lstm := configs.pop("lstm", None)) is not None:
        configs |= {f"lstm, forget bias {bias:g}": replace(lstm, forget_bias=bias) for bias in parsed.forget_bias}
    for name, config in configs.items():
        module = RecurrentLM(config)
        params = module.init(jax.random.key(parsed.seed), jnp.zeros((1, 2), jnp.int32))["params"]
        born[name] = flow(module, params, data, parsed.texts)
        if parsed.steps:
            grown[name] = flow(module, trained(module, params, data, parsed, name), data, parsed.texts)
    return {"at birth": born} | ({f"after {parsed.steps} steps": grown} if parsed.steps else {})


def trained(module: RecurrentLM, params: Any, data: Prepared, parsed: Arguments, name: str) -> Any:
    """The parameters after a short training, every sequence from the zero state."""
    from functools import partial

    import jax

    from xylem.data.pipeline import TrainIterator
    from xylem.training.config import OptimizerConfig
    from xylem.training.objective_config import ObjectiveConfig
    from xylem.training.objectives import causal_lm
    from xylem.training.optimizers import make_optimizer
    from xylem.training.state import new_state
    from xylem.training.step import train_step

    settings = OptimizerConfig(learning_rate=parsed.learning_rate, warmup_steps=min(20, parsed.steps // 10))
    optimizer = make_optimizer(settings, parsed.steps)
    loss = partial(causal_lm, module, ObjectiveConfig())
    step = jax.jit(partial(train_step, loss=loss, optimizer=optimizer), donate_argnums=0)
    state, batches = new_state(params, optimizer, parsed.seed), TrainIterator(data, parsed.batch_size, parsed.seed)
    for done in range(1, parsed.steps + 1):
        state, row = step(state, next(batches))
        if done % 50 == 0 or done == parsed.steps:
            print(f"{name}: step {done}/{parsed.steps}  loss {float(row['loss']):.4f}")
    return state.params


def flow(module: RecurrentLM, params: Any, data: Prepared, texts: int) -> dict[str, list[float]]:
    """What arrives k steps back in the last layer, a power of ten: mean, least and greatest over stretches of text."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np

    from xylem.data.pipeline import eval_batches
    from xylem.models.cells import gradient_flow
    from xylem.peft import tree

    batch, last = next(eval_batches(data, "validation", texts)), module.config.num_layers - 1
    tokens = jnp.asarray(batch["tokens"])
    out: Any = module.clone(taps=("embed", "block_out")).apply({"params": params}, tokens)
    inputs = out.taps["block_out"][last - 1] if last else out.taps["embed"]
    weights = tree.layer(params, last)["cell"]
    powers = np.asarray(jax.jit(partial(gradient_flow, module.config.cell))(weights, inputs))
    return {name: getattr(powers, of)(0).tolist() for name, of in {"mean": "mean", "low": "min", "high": "max"}.items()}


def show(stages: dict[str, Any]) -> None:
    """A table of the means at distances that grow fourfold."""
    from rich.console import Console
    from rich.table import Table

    curves = {(stage, cell): curve["mean"] for stage, cells in stages.items() for cell, curve in cells.items()}
    length = min(len(curve) for curve in curves.values())
    steps = sorted({min(4**i, length - 1) for i in range(length.bit_length())})
    table = Table(box=None, pad_edge=False)
    for name in ("", "cell", *(f"k = {k}" for k in steps)):
        table.add_column(name, justify="right" if name.startswith("k") else "left")
    for (stage, cell), curve in curves.items():
        table.add_row(stage, cell, *(f"{curve[k]:.1f}" for k in steps))
    console = Console()
    console.print("\n[bold]log10 of the gradient k steps back[/bold]")
    console.print(table)


if __name__ == "__main__":
    launch(main)
