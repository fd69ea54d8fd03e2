"""The one loop: config -> mesh -> data -> state -> restore -> steps -> report.

Everything that differs between runs is a value of ``RunConfig``; everything that differs between kinds of training is
the loss and what ``peft.tree.partition`` lets move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xylem import models
from xylem.data import pipeline
from xylem.data.config import cache_root
from xylem.errors import ConfigError, NonFiniteError
from xylem.sharding import BATCH, batch_sharding, make_mesh
from xylem.training import metrics as measure
from xylem.training import report
from xylem.training.checkpoint import Checkpoints
from xylem.training.config import RunConfig
from xylem.training.console import console
from xylem.training.evaluate import figures
from xylem.training.objectives import causal_lm
from xylem.training.optimizers import make_optimizer
from xylem.training.run_folder import open_run
from xylem.training.schedules import make_schedule
from xylem.training.signals import stop_requests
from xylem.training.state import abstract_state, make_state, new_state
from xylem.training.step import eval_step, train_step

NONFINITE_LIMIT = 3  # steps in a row
# What may differ when a run folder is opened again: how far to go, how to watch, on which devices.
CHANGEABLE = ("steps", "mesh.*", "*_every", "evaluate_batches", "keep", "sample_prompt", "run_dir", "data.cache_dir",
              "model.compute.*")  # fmt: skip


def pretrain(config: RunConfig, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Train a language model as ``config`` says, or go on with what its run folder holds; returns the final figures.

    The run folder gets the resolved config, versions, ``metrics.jsonl``, TensorBoard events, checkpoints, the
    tokenizer, samples, a loss curve and ``summary.json``. Stopped by SIGTERM or Ctrl-C it saves and returns; the same
    call continues bit for bit.

    Raises:
        ConfigError, CheckpointError, BusyError, NonFiniteError: see ``xylem/errors.py``.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_root(config.data.cache_dir) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    module = models.build(config.model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    loss = partial(causal_lm, module, config.objective)

    def create():
        params = module.init(jax.random.key(config.seed), jnp.zeros((1, 2), jnp.int32))["params"]
        return new_state(params, optimizer, config.seed, config.ema)

    abstract = abstract_state(create, mesh)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    parts = math.prod(mesh.shape[axis] for axis in BATCH) * config.accumulate
    if config.batch_size % parts:
        allowed = f"mesh.data x mesh.fsdp x accumulate = {parts} must divide it"
        raise ConfigError("batch_size", config.batch_size, allowed)

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        settings = dataclasses.asdict(config)
        writer = jax.process_index() == 0
        space = {"changeable": CHANGEABLE, "needed_bytes": 2 * size}
        run = enter(open_run(config.run_dir, settings, argv, writer=writer, **space))
        data = pipeline.prepare(config.data)
        _check_vocabulary(config, data)
        if writer:
            data.tokenizer.save(run.path / "tokenizer")
        checkpoints = enter(Checkpoints(run.checkpoints, config.keep))
        enter(jax.set_mesh(mesh))
        restored = checkpoints.restore(abstract)
        state = make_state(create, abstract) if restored is None else restored.state
        start = 0 if restored is None else restored.step
        best = None if restored is None else restored.metadata["best_validation"]
        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = pipeline.train_iterator(data, config.batch_size, config.seed, start, **hosts)
        if restored is not None:
            batches.set_state(restored.data_state)
        logs = (run.metrics, run.path / "tensorboard") if writer else (None,)
        log = enter(measure.metrics_log(*logs, resumed_at=start))
        screen = enter(console(config.steps, config.log_every))
        for line in report.opening(config, data, mesh, state, restored):
            screen.note(line)

        place = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
        where = jax.tree.map(lambda x: x.sharding, abstract)
        step_options = {"loss": loss, "optimizer": optimizer, "accumulate": config.accumulate, "ema": config.ema}
        step_once = jax.jit(partial(train_step, **step_options), donate_argnums=0, out_shardings=(where, None))
        validate_once = jax.jit(partial(eval_step, loss=loss))
        tokens_a_step = config.batch_size * config.data.sequence_length
        flops = measure.train_flops_per_token(config.model, config.data.sequence_length)
        peak = measure.peak_flops(list(mesh.devices.flat))
        speed, clock = measure.Throughput(), time.perf_counter()

        def validate(limit: int | None) -> dict[str, float]:
            """Figures of the first ``limit`` validation batches, or of all; of the averaged weights where kept."""
            held_out = pipeline.eval_batches(data, "validation", config.batch_size, **hosts)
            params = state.averaged
            sums = [validate_once(params, jax.tree.map(place, b)) for b in itertools.islice(held_out, limit)]
            named = figures(sums, data.counts["validation"])
            return {f"validation_{name}": value for name, value in named.items()}

        def row_of(step: int, out: dict[str, Any]) -> dict[str, Any]:
            """One row of metrics; reading them waits for the step."""
            nonlocal clock
            row = {"step": step, "tokens": step * tokens_a_step, **{name: float(value) for name, value in out.items()}}
            if row.pop("nonfinite") >= NONFINITE_LIMIT:
                rows = f"rows {(step - NONFINITE_LIMIT) * config.batch_size} to {step * config.batch_size - 1}"
                raise NonFiniteError(
                    f"step {step}: gradients were not finite {NONFINITE_LIMIT} times in a row ({rows} of the shuffled "
                    f"corpus); nothing was learned from those. Lower optimizer.learning_rate; the last checkpoint in "
                    f"{run.checkpoints} is sound."
                )
            now = time.perf_counter()
            rate = speed.update(tokens_a_step, now - clock)
            clock = now
            row |= {"learning_rate": np.asarray(schedule(step - 1)).item(), "tokens_per_second": rate}
            row |= {"mfu": measure.mfu(rate, flops, peak), "checkpoint_age": checkpoints.age()}
            return row | {"eta_seconds": speed.eta((config.steps - step) * tokens_a_step)}

        def show(row: dict[str, Any]) -> None:
            if row["step"] % config.log_every == 0 or row["step"] == config.steps or "validation_loss" in row:
                log(row)
            screen.update(row)

        stop = enter(stop_requests())
        due = lambda every, step: every and step % every == 0  # noqa: E731
        evaluate_every, save_every, sample_every = config.evaluate_every, config.save_every, config.sample_every
        last, step = None, start
        for step in range(start + 1, config.steps + 1):
            state, out = step_once(state, jax.tree.map(place, next(batches)))
            if last is not None:
                show(row_of(*last))  # the step before: this one is running meanwhile
            if notice := checkpoints.poll():
                screen.note(notice)
            last = (step, out)
            finishing = step == config.steps or stop()
            if not finishing and not any(due(every, step) for every in (evaluate_every, save_every, sample_every)):
                continue
            (row, last), improved = (row_of(*last), None), False
            if due(evaluate_every, step) or step == config.steps:
                row |= validate(config.evaluate_batches)
                improved = best is None or row["validation_loss"] < best
                best = row["validation_loss"] if improved else best
            show(row)
            if (finishing or improved or due(save_every, step)) and int(state.nonfinite) == 0:
                metadata = {"config": settings, "tokenizer_hash": data.tokenizer.hash, "best_validation": best}
                if notice := checkpoints.save(step, state, batches.get_state(), metadata, best=improved):
                    screen.note(notice)
            if due(sample_every, step) and not finishing:
                screen.note(report.sample(module, state.averaged, data.tokenizer, config.sample_prompt))
            clock = time.perf_counter()
            if finishing:
                break
        checkpoints.wait()
        if step < config.steps:
            screen.note(f"stopped at step {step} of {config.steps}, saved; the same command goes on from here")
            return {"step": step}
        final = {"step": step, **validate(None)}
        return report.closing(config, run.path, data, module, state.averaged, final, screen.note)


def _check_vocabulary(config: RunConfig, data: pipeline.Prepared) -> None:
    if data.tokenizer.vocab_size > config.model.vocab_size:
        allowed = f"the tokenizer {config.data.tokenizer} has {data.tokenizer.vocab_size} tokens, so at least that"
        raise ConfigError("model.vocab_size", config.model.vocab_size, allowed)
