"""The kernel of the selective scan becomes TPU code, both ways, and asks for far less memory than the parallel form."""

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: libtpu reads its environment once.
PROGRAM = """
import json
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from xylem.models.selective_scan import selective_scan
from xylem.training.plan import _devices

device = SingleDeviceSharding(_devices("v5e:2x4")[0])
B, T, I, Z = 2, 512, 384, 16
shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32, sharding=device)
args = {"x": shape(B, T, I), "delta": shape(B, T, I), "A": shape(I, Z), "B": shape(B, T, Z), "C": shape(B, T, Z),
        "D": shape(I), "start": shape(B, Z, I), "keep": shape(B, T)}
for rule in ("euler", "zoh"):
    for form in ("kernel", "parallel"):
        def loss(args):
            y, last = selective_scan(**args, rule=rule, form=form)
            return (y * y).sum() + (last * last).sum()

        compiled = jax.jit(jax.grad(loss)).lower(args).compile()
        kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
        print(json.dumps([rule, form, kernels, compiled.memory_analysis().temp_size_in_bytes]))
"""


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_kernel_compiles_for_a_tpu_in_both_directions():
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {(rule, form): rest for rule, form, *rest in map(json.loads, done.stdout.splitlines())}
    for rule in ("euler", "zoh"):
        kernels, memory = found[rule, "kernel"]
        assert kernels == 2, "one forward, one backward"
        assert found[rule, "parallel"][0] == 0 and memory < found[rule, "parallel"][1] / 10
