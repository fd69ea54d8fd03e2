"""Many small runs for a scaling law: which ones, trained by as many processes as like to, and what they reached.

Every run of a sweep is an ordinary run folder (``loop.pretrain``), named after its size and its budget, in the folder
of the sweep. Nothing else is kept: a run whose folder holds a ``summary.json`` is done, one whose folder is locked is
being trained by another process, all others are anybody's.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xylem import models
from xylem.data import pipeline
from xylem.errors import BusyError, ConfigError, NonFiniteError
from xylem.files import read_object
from xylem.models.config import TransformerConfig
from xylem.models.settings import Compute, from_dict
from xylem.peft import tree
from xylem.training.config import RunConfig
from xylem.training.loop import pretrain
from xylem.training.run_folder import CONFIG

# Steps. The first fall of a loss is no power of the tokens: with runs of 60 to 130 steps the default sweep's law missed
# its best runs by 3 to 6%, without them all runs but one by less than 2%.
SHORTEST = 150
LOOK_AGAIN = 3.0  # seconds between looks at runs that other processes train


@dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
        flops: the budget it belongs to; ``6 N D`` comes as close to it as whole steps can.
        N: parameters.
        D: tokens trained on.
    """

    config: RunConfig
    flops: float
    N: int
    D: int

    @property
    def name(self) -> str:
        """That of its folder."""
        return Path(self.config.run_dir).name


def resized(model: TransformerConfig, d_model: int, num_layers: int) -> TransformerConfig:
    """A model of the same family and proportions, ``d_model`` wide (a multiple of 16), with heads of 32 or of 16.

    What writes into the residual stream starts smaller the more layers there are, as GPT-2's rule is.
    """
    if d_model < 16 or d_model % 16 or num_layers < 1:
        allowed = "the width is a multiple of 16, and there is at least one layer"
        raise ConfigError("sizes", f"{d_model}x{num_layers}", allowed)
    head_dim = 16 if d_model % 32 else 32
    return replace(
        model,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=d_model // head_dim,
        num_kv_heads=d_model // head_dim,
        head_dim=head_dim,
        d_ff=8 * round(d_model * model.d_ff / model.d_model / 8),
        init=replace(model.init, residual=model.init.residual * (model.num_layers / num_layers) ** 0.5),
    )


def planned(base: RunConfig, sizes: Sequence[str], budgets: Sequence[float], epochs: float) -> list[Run]:
    """The runs of every size (``WIDTHxLAYERS``) at every budget of FLOPs, cheapest first; prepares the data.

    A run trains as many tokens as its budget pays for (D = C / 6 N); its schedule has that length, and its warm-up is
    at most a tenth of it. Left out are runs of fewer than ``SHORTEST`` steps and of more than ``epochs`` times the
    training text: a law of tokens is one of new tokens.

    Raises:
        ConfigError: a size that is none, a budget that is not positive, a model that has no sizes, a batch that grows,
            or no run is left.
    """
    if not isinstance(base.model, TransformerConfig) or base.model.attention.mask != "causal":
        raise ConfigError("PRESET", base.model.family, "a sweep is of transformers that predict the next token")
    if base.ramp.tokens:
        raise ConfigError("ramp.tokens", base.ramp.tokens, "0: the batches of a sweep have one size")
    tokens = pipeline.prepare(base.data).counts["train"]["tokens"]
    a_step, runs = base.batch_size * base.data.sequence_length, []
    for size in sizes:
        if not (match := re.fullmatch(r"(\d+)x(\d+)", size)):
            raise ConfigError("sizes", size, "WIDTHxLAYERS, as 64x3")
        model = resized(base.model, *map(int, match.groups()))
        count = parameters(model)
        for flops in budgets:
            if not 0.0 < flops < math.inf:
                raise ConfigError("flops", flops, "a positive number")
            steps = round(flops / (6.0 * count * a_step))
            if steps >= SHORTEST and steps * a_step <= epochs * tokens:
                optimizer = replace(base.optimizer, warmup_steps=min(base.optimizer.warmup_steps, steps // 10))
                folder = str(Path(base.run_dir) / f"{size}-{flops:.3g}")
                config = replace(base, model=model, optimizer=optimizer, steps=steps, run_dir=folder)
                runs.append(Run(config, flops, count, steps * a_step))
    if not runs:
        allowed = f"no run has between {SHORTEST} steps of {a_step} tokens and {epochs:g} epochs of {tokens:,}"
        raise ConfigError("flops", [*budgets], allowed)
    return sorted(runs, key=lambda run: (run.flops, run.N))


def parameters(model: TransformerConfig) -> int:
    """How many parameters a model has; none is made."""
    init = lambda: models.build(model).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))  # noqa: E731
    return tree.count(jax.eval_shape(init)["params"])


def reached(run: Run) -> float | None:
    """The final validation loss of a run, in nats a token; None where it is not done.

    Raises:
        ConfigError: its folder holds a run with other settings.
    """
    folder = Path(run.config.run_dir)
    if not (folder / "summary.json").exists():
        return None
    there, now = _recipe(from_dict(RunConfig, read_object(folder / CONFIG, "run-dir"))), _recipe(run.config)
    for name in there:
        if there[name] != now[name]:
            allowed = (
                f"it holds a run with another {name}; name another folder\n  there {there[name]}\n  now   {now[name]}"
            )
            raise ConfigError("run-dir", str(folder), allowed)
    return float(read_object(folder / "summary.json", "run-dir")["validation_loss"])


def train(runs: Sequence[Run], argv: Sequence[str], note: Callable[[str], None]) -> None:
    """Train what is not done, until all is, together with every other process that was started alike.

    A run that another process holds is looked at again later: where that process dies, this one goes on from its last
    checkpoint. A run that becomes non-finite is told of and left out.

    Raises:
        KeyboardInterrupt: a run was stopped; the same call goes on.
    """
    left = [run for run in runs if reached(run) is None]
    note(f"{len(runs)} runs, {len(left)} of them to train")
    while left:
        busy = []
        for run in left:
            if reached(run) is not None:
                continue  # by another process, meanwhile
            try:
                final = pretrain(run.config, argv)
            except BusyError:
                busy.append(run)
                continue
            except NonFiniteError as error:
                note(f"{run.name} is left out: {error}")
                continue
            if final["step"] < run.config.steps:
                raise KeyboardInterrupt
            jax.clear_caches()  # no other run has the same shapes and schedule
            done = sum(reached(other) is not None for other in runs)
            note(f"--- {run.name} done, {done} of {len(runs)}: loss {final['validation_loss']:.4f}")
        if busy and len(busy) == len(left):
            time.sleep(LOOK_AGAIN)
        left = busy


def _recipe(config: RunConfig) -> dict[str, Any]:
    """What a final loss depends on."""
    network, text = config.model.with_compute(Compute()), replace(config.data, cache_dir=None)
    names = ("optimizer", "objective", "batch_size", "seed", "ema", "steps")
    return {"model": network, "data": text, **{name: getattr(config, name) for name in names}}
