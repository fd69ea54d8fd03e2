"""Sharding as a table: which axis of which parameter lies on which axis of the mesh.

Mesh axes: ``data`` replicates the model and splits the batch; ``fsdp`` splits the batch and the parameters (ZeRO-3
1910.02054); ``tensor`` splits heads and feed-forward columns (Megatron 1909.08053, section 3). One device is the mesh
1 x 1 x 1: the same program everywhere.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from xylem.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
P = PartitionSpec

_SIDE = r"(encoder/|decoder/)?"
_LAYERS = _SIDE + r"layers(_\d+)?/"
# Specs are right-aligned: leading axes (layers, experts) that a spec does not name are not split.
# Column-parallel kernels (in -> split out) feed row-parallel ones (split in -> out): one all-reduce a sublayer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (_SIDE + r"(positions|token_types)/embedding", P(None, "fsdp")),
    (_SIDE + r"embed_norm/(scale|bias)", P()),
    (r"embed_projection/kernel", P("fsdp", "tensor")),
    (r"embed_projection/bias", P()),
    (
        _LAYERS + r"(cross_)?attention/(query|key|value|query_key_value)/kernel",
        P("fsdp", "tensor"),
    ),
    (_LAYERS + r"(cross_)?attention/(query|key|value|query_key_value)/bias", P("tensor")),
    (_LAYERS + r"(cross_)?attention/output/kernel", P("tensor", "fsdp")),
    (_LAYERS + r"mlp/(gate|up|up_gate)/kernel", P("fsdp", "tensor")),
    (_LAYERS + r"mlp/(gate|up|up_gate)/bias", P("tensor")),
    (_LAYERS + r"mlp/down/kernel", P("tensor", "fsdp")),
    (_LAYERS + r"((cross_)?attention/output|mlp/down)/bias", P()),
    (_LAYERS + r"mixer/(input|gate|input_gate)/kernel", P("fsdp", "tensor")),
    (_LAYERS + r"mixer/(low|B|C)/kernel", P(("tensor", "fsdp"), None)),
    (_LAYERS + r"mixer/delta/kernel", P(None, ("tensor", "fsdp"))),
    (_LAYERS + r"mixer/conv/kernel", P(None, "tensor")),
    (_LAYERS + r"mixer/((conv|delta|input|gate)/bias|D)", P("tensor")),
    (_LAYERS + r"mixer/(low|B|C|output)/bias", P()),
    (_LAYERS + r"mixer/A_log", P("tensor", None)),
    (_LAYERS + r"mixer/start", P(None, "tensor")),
    (_LAYERS + r"mixer/output/kernel", P("tensor", "fsdp")),
    (_LAYERS + r"((cross_)?attention|mlp|mixer)_norm/(scale|bias)", P()),
    (_LAYERS + r"(cross_)?attention/prefix/(key|value)", P(None, "tensor")),
    (_SIDE + r"prefix/(cross_)?attention/(embedding|(up|down)/(kernel|bias))", P()),
    (r"prompt/embedding", P(None, "fsdp")),
    (_LAYERS + r"((cross_)?attention|mlp|mixer)_adapter/(down|up)/(kernel|bias)", P()),
    (rf"({_LAYERS}cell|lstm_\d+)/(input|recurrent)/kernel", P("fsdp", "tensor")),
    (rf"({_LAYERS}cell|lstm_\d+)/(input|recurrent)/bias", P("tensor")),
    (r"attention/kernel", P()),
    (r"(encoder|decoder)/relative_bias/embedding", P(None, "tensor")),
    (_SIDE + r"final_norm/(scale|bias)", P()),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"(head/transform|pooler|classifier/dense)/kernel", P("fsdp", "tensor")),
    (r"(pair_head|classifier|tagger)/kernel", P("fsdp", None)),
    (r"head/norm/(scale|bias)", P()),
    (r"(head|head/transform|pooler|pair_head|classifier|classifier/dense|tagger)/bias", P()),
)
# Which axis is the vocabulary, of a weight and of the parts of a leaf in its place. Published ones are often divisible
# by nothing (GPT-2's is 50,257): where the mesh does not divide it, this axis alone stays whole.
VOCABULARY = {"embed/embedding": 0, "head/kernel": 1}


def join_hosts() -> None:
    """Join the other processes of this run, where the environment says that there are some; else nothing happens.

    A TPU pod says so itself. Elsewhere each process is given JAX_COORDINATOR_ADDRESS (host:port of process 0), and
    JAX_NUM_PROCESSES and JAX_PROCESS_ID unless a cluster manager that jax knows (Slurm, MPI, Kubernetes) tells them.

    Raises:
        ConfigError: a number among these variables is none.
    """
    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    if (pod or "JAX_COORDINATOR_ADDRESS" in os.environ) and not jax.distributed.is_initialized():
        numbers = {}
        for argument in ("num_processes", "process_id"):
            name = f"JAX_{argument.upper()}"  # jax reads the address, but not these two
            if name in os.environ and not os.environ[name].isdigit():
                raise ConfigError(name, os.environ[name], "a whole number: how many processes, and which this is")
            numbers[argument] = int(os.environ[name]) if name in os.environ else None
        jax.distributed.initialize(**numbers)


def anywhere(holds: bool) -> bool:
    """Whether it holds on any host. All hosts must ask together; each then waits for what its devices still compute."""
    if jax.process_count() == 1:
        return holds
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(holds))))


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh ``data x fsdp x tensor`` over ``devices``, or over all; ``data = -1`` takes what the others leave."""
    available = list(jax.devices() if devices is None else devices)
    for name, size in (("fsdp", fsdp), ("tensor", tensor), ("data", data)):
        if size < 1 and not (name == "data" and size == -1):
            raise ConfigError(f"mesh.{name}", size, "it must be at least 1 (data may be -1: all remaining devices)")
    if data == -1:
        if len(available) % (fsdp * tensor):
            allowed = f"their product must divide the number of devices, {len(available)}"
            raise ConfigError("mesh.fsdp x mesh.tensor", f"{fsdp} x {tensor}", allowed)
        data = len(available) // (fsdp * tensor)
    shape = (data, fsdp, tensor)
    if math.prod(shape) > len(available):
        allowed = f"their product must be at most the number of devices, {len(available)}"
        raise ConfigError("mesh.data x mesh.fsdp x mesh.tensor", " x ".join(map(str, shape)), allowed)
    used = available[: math.prod(shape)]
    # create_device_mesh (inside make_mesh) orders devices by the machine's wiring. Auto axes leave the layout of
    # activations to the compiler; jax.make_mesh alone would make them Explicit.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=used)


def path_name(path: Any) -> str:
    """A tree path as ``layers/attention/query/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(name: str, ndim: int) -> PartitionSpec:
    """The spec of the parameter at path ``name``; raises ValueError unless exactly one rule matches."""
    matches = [(rule, spec) for rule, spec in RULES if re.fullmatch(rule, name)]
    if len(matches) != 1:
        raise ValueError(f"{name}: {len(matches)} sharding rules match ({[rule for rule, _ in matches]}); one must")
    spec = matches[0][1]
    return P(*[None] * (ndim - len(spec)), *spec) if len(spec) else P()


def param_specs(params: Any) -> Any:
    """A PartitionSpec for every array of a parameter tree; a leaf that is no array gives the specs of its parts."""
    own = lambda weight: hasattr(weight, "specs")  # noqa: E731  (models/leaves.py: a weight that is no array)

    def spec(path, weight):
        found = spec_for(path_name(path), len(weight.shape))
        return weight.specs(found) if own(weight) else found

    return jax.tree_util.tree_map_with_path(spec, params, is_leaf=own)


def shardings(params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a parameter tree, after checking that the mesh divides it.

    Raises:
        ConfigError: it does not divide an axis other than ``VOCABULARY``.
    """
    specs = param_specs(params)

    def place(path, weight, spec):
        name, axes = path_name(path), list(spec)
        for axis, (size, names) in enumerate(zip(weight.shape, spec, strict=False)):
            names = (names,) if isinstance(names, str) else names or ()
            parts = math.prod(mesh.shape[each] for each in names)
            if size % parts == 0:
                continue
            table = next((each for each in VOCABULARY if f"{name}/".startswith(f"{each}/")), None)
            if table is None or VOCABULARY[table] != axis:
                allowed = f"it must divide axis {axis} of {name}, of size {size}"
                raise ConfigError(" x ".join(f"mesh.{each}" for each in names), parts, allowed)
            axes[axis] = None
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(place, params, specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch lie on ``data`` and ``fsdp`` together."""
    return NamedSharding(mesh, P(BATCH))


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin the layout of an activation, ``"batch"`` standing for the mesh axes that split rows; no mesh, no effect.

    An axis that its mesh axes do not divide (one prompt on many devices) is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(axes, _undivided(mesh, x.shape, axes)))


def by_parts(
    function: Callable[..., Any], inputs: Sequence[tuple[str | None, ...]], outputs: Sequence[tuple[str | None, ...]]
) -> Callable[..., Any]:
    """``function`` called on every device with its parts of the arguments, none of which needs another's.

    For what the compiler cannot cut by itself: loops over rows, kernels. ``inputs`` and ``outputs`` name the axes of
    each argument and of each result as ``constrain`` does; an axis that the mesh does not divide in every argument
    stays whole. Gradients of what devices share are summed over them. No mesh, no effect.
    """

    def call(*args: Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return function(*args)
        whole = {axis for arg, axes in zip(args, inputs, strict=True) for axis in _undivided(mesh, arg.shape, axes)}
        specs = [tuple(_spec(axes, whole) for axes in each) for each in (inputs, outputs)]
        return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], check_vma=False)(*args)

    return call


def _names(axis: str) -> tuple[str, ...]:
    return BATCH if axis == "batch" else (axis,)


def _undivided(mesh: Any, shape: Sequence[int], axes: Sequence[str | None]) -> set[str]:
    """Those of ``axes`` whose mesh axes do not divide their size."""
    pairs = [(size, axis) for size, axis in zip(shape, axes, strict=True) if axis is not None]
    return {axis for size, axis in pairs if size % math.prod(mesh.shape[name] for name in _names(axis))}


def _spec(axes: Sequence[str | None], whole: set[str]) -> PartitionSpec:
    return P(*(None if axis is None or axis in whole else _names(axis) for axis in axes))
