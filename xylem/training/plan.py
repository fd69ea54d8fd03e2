"""Does a run fit? Its training step compiled for a TPU topology, with no TPU at hand.

XLA compiles for TPUs on any machine that has ``libtpu``; what it then says of memory is what the chips will need.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from xylem.errors import ConfigError
from xylem.sharding import batch_sharding, make_mesh
from xylem.training.config import RunConfig
from xylem.training.inputs import example_shapes
from xylem.training.program import assemble, settled

GIB = 2**30
# High-bandwidth memory of a device as jax counts them, bytes (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
HBM = {
    "TPU v4": 32 * GIB,
    "TPU v5 lite": 16 * GIB,  # v5e
    "TPU v5": 95 * GIB,  # v5p
    "TPU v6 lite": 32 * GIB,  # v6e
}
COLLECTIVES = r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
# libtpu asks Google's metadata server and its own environment where it runs; off a TPU machine nobody answers.
_NO_TPU_HERE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


@dataclass(frozen=True)
class Plan:
    """One training step on one chip of a topology; sizes in bytes.

    Attributes:
        kind, chips: which device, and how many the topology has.
        state: parameters, optimizer and average as the shardings cut them: computed, not compiled.
        arguments, outputs, aliased, temporaries, code: what the compiler allots; ``aliased`` outputs reuse arguments.
        hbm: memory of a chip; None where it is not known.
        collectives: how often each communication stands in the program (one inside a scan stands once).
    """

    kind: str
    chips: int
    state: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    hbm: int | None
    collectives: dict[str, int]

    @property
    def total(self) -> int:
        """The most the step holds at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def fits(self) -> bool | None:
        """Whether a chip can hold it; None where its memory is not known."""
        return None if self.hbm is None else self.total <= self.hbm


def plan(config: RunConfig, topology: str) -> Plan:
    """Compile the training step of a run for ``topology`` (``v5e:2x4``: version and chips along each axis).

    Takes about a minute. What ``compute`` leaves to measurement is settled as on a TPU: plain kernels, scanned layers.

    Raises:
        ConfigError: no libtpu, no such topology, a mesh that does not divide, or a step that cannot fit a chip.
    """
    devices = _devices(topology)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    program = assemble(settled(config, kernels="plain", layers="scan", scan="kernel"), mesh)
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.abstract, _abstract_batch(config, mesh))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _too_large(config, topology, error) from error
    memory: Any = compiled.memory_analysis()
    part = lambda x: int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize  # noqa: E731
    kind = devices[0].device_kind
    return Plan(
        kind=kind,
        chips=len(devices),
        state=sum(part(x) for x in jax.tree.leaves(program.abstract)),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        hbm=HBM.get(kind),
        collectives=dict(Counter(re.findall(COLLECTIVES, compiled.as_text() or ""))),
    )


def _devices(topology: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        allowed = "`plan` compiles for TPUs, which needs libtpu: pip install 'xylem-lm[plan]'"
        raise ConfigError("topology", topology, allowed)
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        allowed = f"it is a TPU version and its chips along each axis, as v5e:2x4, v5p:4x4x4 or v6e:16x16 ({reason})"
        raise ConfigError("topology", topology, allowed) from error


def _abstract_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    where = batch_sharding(mesh)
    shapes = example_shapes(config)
    struct = jax.ShapeDtypeStruct
    return {name: struct((config.batch_size, *shape), kind, sharding=where) for name, (shape, kind) in shapes.items()}


def _too_large(config: RunConfig, topology: str, error: Exception) -> Exception:
    """The compiler stops when a chip's memory is too small; any other failure of it is passed on."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    sizes = re.findall(r"\b\d+(?:\.\d+)?[MGT]\b", str(error))
    need = (
        f"a chip has {sizes[1]}, the compiler asks for {sizes[0]}" if len(sizes) > 1 else "a chip has too little memory"
    )
    remat = config.model.compute.remat
    allowed = (
        f"{need}: lower batch_size, raise accumulate or mesh.fsdp, or set model.compute.remat (now {remat}) to full"
    )
    return ConfigError("topology", topology, allowed)
