"""How a script starts: what it settles before jax computes anything."""

import os
import subprocess
import sys

import pytest

DISPATCH = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from xylem.launch import settle_jax
if sys.argv[1] == "settled":
    settle_jax(Path(sys.argv[2]))
x = jnp.ones((500, 500))
long = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: jnp.tanh(y @ y), x))
long(x).block_until_ready()
done = long(x)
print(done.is_ready(), jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("name", ["settled", "left alone"])
def test_launch_settles_that_a_cpu_computes_before_the_call_returns(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", DISPATCH, name, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment | {"XLA_FLAGS": ""}, timeout=120)
    # Some tenths of a second of products: computed elsewhere, they cannot be done the moment after the call.
    expected = f"True {tmp_path}\n" if name == "settled" else "False None\n"
    assert run.stdout == expected, run.stderr


def test_launch_keeps_memory_on_a_cpu_and_leaves_a_users_settings_alone():
    code = "from xylem.launch import launch; import os; launch(lambda a: print(os.environ.get('MALLOC_ARENA_MAX')))"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    env["JAX_PLATFORMS"] = "cpu"
    call = lambda **more: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, **more}, timeout=120
    ).stdout.strip()
    assert call() == "1"
    assert call(MALLOC_TOP_PAD_="1000") == "None"


def test_launch_ends_in_silence_when_nobody_reads():
    code = "from xylem.launch import launch; launch(lambda a: [print('line', n) for n in range(100_000)])"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stderr is not None
    assert run.stdout.readline() == "line 0\n"
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait(60) == 128 + 13
    run.stderr.close()
