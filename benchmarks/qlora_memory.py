"""What a chip's memory holds at most in a training step of QLoRA, and of LoRA on a base of bfloat16.

Compiled for one TPU v5e on any machine that has libtpu; nothing is run. TinyLlama's shape (22 layers of 2048, 32 heads
over 4, feed-forward 5632, V 32000), one text of 128 tokens, rank 8 beside every matrix, each layer recomputed for the
backward pass, all in bfloat16. Prints a JSON object a method, sizes in bytes, and the ratio of the peaks.

    python benchmarks/qlora_memory.py [--layers N]
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xylem import models
from xylem.models.llama import llama
from xylem.models.settings import Compute
from xylem.peft.calls import METHODS
from xylem.peft.config import LoRAConfig, QLoRAConfig
from xylem.sharding import batch_sharding, make_mesh
from xylem.training.config import OptimizerConfig
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm
from xylem.training.optimizers import make_optimizer
from xylem.training.paging import paged, paged_step
from xylem.training.plan import _devices
from xylem.training.state import abstract_state, new_state
from xylem.training.step import train_step

BATCH, LENGTH, RANK = 1, 128, 8
METHOD_OF = {
    "lora": LoRAConfig(rank=RANK),
    "qlora": QLoRAConfig(rank=RANK),
    "int8": QLoRAConfig(rank=RANK, kind="int8"),
    "paged": QLoRAConfig(rank=RANK),
}


def step_memory(name: str, layers: int, mesh: Mesh) -> dict[str, Any]:
    """Sizes the compiler allots to the step of one method."""
    compute = Compute("bfloat16", "bfloat16", remat="full", layers="scan", kernels="plain")
    config = llama(layers, 2048, 32, 4, 5632, 32000, 2048, rope_theta=1e4, norm_eps=1e-5, head="untied")
    module, settings = models.build(config.with_compute(compute)), METHOD_OF[name]
    method = METHODS["lora" if name == "lora" else "qlora"]
    optimizer = make_optimizer(OptimizerConfig(), 1000)

    def create():
        params: Any = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        grafted = method.graft(params, jax.random.key(1), settings)
        return new_state(grafted, optimizer, 0, trains=method.trainable(grafted, settings))

    abstract = abstract_state(create, mesh)
    step: Any = partial(train_step, loss=partial(causal_lm, module, ObjectiveConfig()), optimizer=optimizer)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    if name == "paged":
        where, step = where.replace(optimizer=paged(where.optimizer, abstract.optimizer)), paged_step(step)
        resharded = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)  # noqa: E731
        abstract = jax.tree.map(resharded, abstract, where)
    kinds = {"tokens": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}
    shape, at = (BATCH, LENGTH), batch_sharding(mesh)
    batch = {key: jax.ShapeDtypeStruct(shape, kind, sharding=at) for key, kind in kinds.items()}
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    with jax.set_mesh(mesh):
        memory: Any = jitted.lower(abstract, batch).compile().memory_analysis()
    held_by = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    sizes = {each: held_by(getattr(abstract, each)) for each in ("trainable", "frozen", "optimizer")}
    held = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    held["code"] = memory.generated_code_size_in_bytes
    held["fresh"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
    host = memory.host_argument_size_in_bytes
    return {"method": name, **sizes, **held, "peak": sum(held.values()), "host": host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora"], choices=sorted(METHOD_OF))
    given = parser.parse_args()
    mesh = make_mesh(devices=_devices("v5e:2x4")[:1])
    peaks = {}
    for name in given.methods:
        found = step_memory(name, given.layers, mesh)
        peaks[name] = found["peak"]
        print(json.dumps(found), flush=True)
    if {"lora", "qlora"} <= set(peaks):
        print(json.dumps({"ratio": round(peaks["qlora"] / peaks["lora"], 4)}))


if __name__ == "__main__":
    main()
