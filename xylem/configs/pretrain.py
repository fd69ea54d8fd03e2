"""Pretraining experiments: each function is one run, ready to start with ``scripts/pretrain.py NAME``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.models import PRESETS
from xylem.models.config import TransformerConfig
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.training.config import OptimizerConfig, RunConfig

T = TypeVar("T")


def default() -> RunConfig:
    """A small LLaMA on WikiText-2, in minutes on two cores.

    Few tokens are all there is time for: hence a small vocabulary (the head is a quarter of the work), four layers wide
    enough for fast products, and Muon.
    """
    model = llama(4, 256, 4, 4, 704, vocab_size=4096, max_length=256, rope_theta=1e4, norm_eps=1e-5, head="tied")
    return RunConfig(
        model=model,
        data=DataConfig(corpus="wikitext2", tokenizer="bpe:4096", sequence_length=256),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, schedule="wsd", warmup_steps=20, decay_fraction=0.4),
        steps=320,
        batch_size=16,
        evaluate_every=100,
        save_every=100,
        sample_every=100,
        sample_prompt="The history of",
    )


def nanogpt_cpu() -> RunConfig:
    """The run nanoGPT publishes for a CPU: 4 layers, 4 heads, width 128, context 64, batch 12, characters."""
    return RunConfig(
        model=gpt(4, 128, 4, vocab_size=1154, max_length=64),  # the characters of WikiText-2 and end-of-text
        data=DataConfig(tokenizer="characters", sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99),
        steps=2000,
        batch_size=12,
    )


def published(model: TransformerConfig) -> RunConfig:
    """A published model size on the default corpus: what to start from on a mesh."""
    length = min(1024, model.max_length)
    data = DataConfig(tokenizer="bpe:32000", sequence_length=length)
    compute = replace(model.compute, dtype="bfloat16", remat="full")
    return RunConfig(model=replace(model, compute=compute), data=data, batch_size=64, steps=100_000)


def _decoders() -> dict[str, TransformerConfig]:
    """The presets that predict the next token, which is what the loop trains."""
    made = {name: preset() for name, preset in PRESETS.items()}
    return {
        name: model
        for name, model in made.items()
        if isinstance(model, TransformerConfig) and model.attention.mask == "causal"
    }


RUNS: dict[str, Callable[[], RunConfig]] = {
    "default": default,
    "nanogpt_cpu": nanogpt_cpu,
    **{name: (lambda model=model: published(model)) for name, model in _decoders().items()},
}


def parse(arguments: list[str], prog: str, description: str, around: Callable[[RunConfig], T]) -> tuple[str, T]:
    """The run a command names in its first word ("default" where it begins with a flag), as its flags change it.

    ``around(run)`` holds the default of every flag of the command: the run itself, or a dataclass with it inside.

    Raises:
        ConfigError: there is no run of that name.
    """
    import tyro

    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    name = named[0] if named else "default"
    if name not in RUNS:
        raise ConfigError("PRESET", name, f"it must be one of {', '.join(RUNS)}", RUNS)
    default = around(RUNS[name]())
    parsed = tyro.cli(
        type(default),
        prog=f"{prog} [PRESET]",
        description=f"{description}\nPresets: {', '.join(RUNS)}.",
        default=default,
        args=arguments[len(named) :],
        config=(tyro.conf.AvoidSubcommands,),
    )
    return name, parsed
