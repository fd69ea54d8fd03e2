"""The one loop: config -> mesh -> data -> state -> restore -> steps -> report.

Everything that differs between runs is a value of ``RunConfig``; everything that differs between kinds of training is
the loss and what ``peft.tree.partition`` lets move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xylem.data import pipeline
from xylem.data.config import cache_root
from xylem.data.pipeline import Prepared
from xylem.errors import NonFiniteError
from xylem.launch import settle_jax
from xylem.models.settings import from_dict
from xylem.sharding import anywhere, batch_sharding, join_hosts, make_mesh
from xylem.training import metrics as measure
from xylem.training import report
from xylem.training.checkpoint import Checkpoints
from xylem.training.config import RunConfig, check_tokenizer, continues, writes
from xylem.training.console import console
from xylem.training.evaluate import carried, figures
from xylem.training.finetune_config import FinetuneConfig
from xylem.training.inputs import objective_data, train_flops_per_token
from xylem.training.objectives import Sums
from xylem.training.program import Program, assemble
from xylem.training.run_folder import CHECKPOINTS, METRICS, open_run
from xylem.training.signals import stop_requests

NONFINITE_LIMIT = 3  # steps in a row
# What may differ when a run folder is opened again: how far to go, how to watch, on which devices.
CHANGEABLE = ("steps", "mesh.*", "*_every", "evaluate_batches", "keep", "sample_prompt", "run_dir", "data.cache_dir",
              "model.compute.*", "optimizer.memory")  # fmt: skip


def pretrain(config: RunConfig, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Train a language model from nothing as ``config`` says: ``train`` on a corpus."""
    return train(config, partial(assemble, config), corpus_of, argv)


def corpus_of(config: RunConfig) -> Prepared:
    """The corpus of a run as its objective reads it."""
    data = pipeline.prepare(config.data)
    check_tokenizer(config, data.tokenizer)
    return objective_data(config, data)


def train(
    config: RunConfig, program_on: Callable[[Mesh], Program], data_of: Callable[[Any], Prepared], argv: Sequence[str]
) -> dict[str, Any]:
    """Train as ``config`` says, or go on with what its run folder holds; returns the final figures.

    The run folder gets the resolved config, versions, ``metrics.jsonl``, TensorBoard events, checkpoints, the
    tokenizer, samples, a loss curve and ``summary.json``. Stopped by SIGTERM or Ctrl-C it saves and returns; the same
    call continues bit for bit. Raises a ``Failure`` of ``xylem/errors.py``.
    """
    settle_jax(cache_root(config.data.cache_dir) / "xla")
    join_hosts()
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    program = program_on(mesh)
    schedule, ramp = program.schedule, config.batch_ramp
    settings, writer = dataclasses.asdict(config), jax.process_index() == 0
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        space = {"changeable": CHANGEABLE, "complete": _completed, "needed_bytes": 2 * program.state_bytes}
        folder = enter(open_run(config.run_dir, settings, argv, writer=writer, **space))
        data = data_of(config)
        if writer:
            data.tokenizer.save(folder / "tokenizer")
        checkpoints = enter(Checkpoints(folder / CHECKPOINTS, config.keep))
        enter(jax.set_mesh(mesh))
        restored = checkpoints.restore(program.saved(program.abstract))
        state = program.start() if restored is None else program.resume(restored.state)
        start = 0 if restored is None else restored.step
        best = restored.metadata["best_validation"] if restored else sys.float_info.max
        consecutive = config.objective.name == "truncated"
        order = "consecutive" if consecutive else "shuffled"
        batches = pipeline.TrainIterator(data, config.batch_size, config.seed, start, order=order, ramp=ramp, **hosts)
        if restored is not None:
            batches.set_state(restored.data_state)

        logs = (folder / METRICS, folder / "tensorboard") if writer else (None,)
        log = enter(measure.metrics_log(*logs, resumed_at=start))
        screen = enter(console(config.steps, config.log_every))
        for line in report.opening(config, data, mesh, state, restored):
            screen.note(line)
        place = partial(jax.tree.map, partial(jax.make_array_from_process_local_data, batch_sharding(mesh)))
        flops = train_flops_per_token(config)
        peak = measure.peak_flops(list(mesh.devices.flat))
        meter = measure.Meter(ramp.tokens_before, flops, peak, config.steps)

        def validation() -> Iterator[Sums]:
            """Sums of each validation batch in turn; of the averaged weights where kept."""
            params, rows = state.averaged, config.batch_size // config.accumulate
            order = "consecutive" if consecutive else "text"
            read = pipeline.eval_batches(data, "validation", rows, order=order, **hosts)
            yield from carried(program.validate, params, map(place, read), program.first_carry())

        def named(sums: Sequence[Sums]) -> dict[str, float]:
            counts = data.counts["validation"] if continues(config) else None
            return {f"validation_{name}": x for name, x in figures(sums, counts).items()}

        def row_of(step: int, computed: dict[str, Any]) -> dict[str, Any]:
            row = meter.row(step, computed)
            if row.pop("nonfinite") >= NONFINITE_LIMIT:
                raise NonFiniteError(
                    f"step {step}: the gradients of {NONFINITE_LIMIT} steps in a row were not finite, and nothing was "
                    f"learned from them; lower optimizer.learning_rate. The checkpoints in {checkpoints.folder} are "
                    "sound"
                )
            rate = np.asarray(schedule(step - 1)).item()
            return row | {"learning_rate": rate, "checkpoint_age": checkpoints.age()}

        def show(row: dict[str, Any]) -> None:
            if due(config.log_every, row["step"]) or row["step"] == config.steps or "validation_loss" in row:
                log(row)
            screen.update(row)

        stop, last, step, row = enter(stop_requests()), None, start, {}
        sums, unread = [], validation()
        events = (config.evaluate_every, config.save_every, config.sample_every)
        for step in range(start + 1, config.steps + 1):
            state = program.restart(state) if program.due(step - 1) else state
            state, computed = program.step(state, place(next(batches)))
            if last is not None:
                show(row_of(*last))  # the step before: this one is running meanwhile
            if notice := checkpoints.poll():
                screen.note(notice)
            last = (step, computed)
            asking = hosts["process_count"] == 1 or due(config.log_every or 1, step)
            finishing = step == config.steps or (asking and anywhere(stop()))  # hosts agree, which waits for devices
            if not finishing and not any(due(every, step) for every in events):
                continue
            (row, last), improved = (row_of(*last), None), False
            if due(config.evaluate_every, step) or step == config.steps:
                unread = validation()
                sums = list(itertools.islice(unread, config.evaluate_batches))
                row |= named(sums)
                improved = row["validation_loss"] < best  # never so for NaN
                best = row["validation_loss"] if improved else best
            if step < config.steps:
                show(row)
            if (finishing or improved or due(config.save_every, step)) and int(state.nonfinite) == 0:
                metadata = {"config": settings, "tokenizer_hash": data.tokenizer.hash, "best_validation": best}
                if notice := checkpoints.save(step, program.saved(state), batches.get_state(), metadata, best=improved):
                    screen.note(notice)
            if due(config.sample_every, step) and not finishing and writes(config):
                given = program.fold(state.averaged)
                screen.note(report.sample(program.module, given, data.tokenizer, report.sample_ids(config, data)))
            if finishing:
                break
            meter.restart()

        checkpoints.wait()
        if step < config.steps:
            screen.note(f"stopped at step {step} of {config.steps}; the same command goes on from the last checkpoint")
            return {"step": step}
        final = named([*sums, *unread])
        if row:  # else all was done before
            show(row | final)  # the last step's row waits for the whole split, its checkpoint does not
        final = {"step": step, **final}
        given = program.fold(state.averaged)
        return report.closing(config, folder, data, program.module, given, final, screen.note)


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """What an older version wrote of a run, with the defaults of the fields that it did not know."""
    return dataclasses.asdict(from_dict(FinetuneConfig if "base" in settings else RunConfig, settings))


def due(every: int, step: int) -> bool:
    """Whether something that happens each ``every`` steps (0: never) happens at this one."""
    return every > 0 and step % every == 0
