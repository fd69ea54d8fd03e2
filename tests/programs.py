"""The scripts, in this process or in one of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(file):
    """The ``main`` of a script."""
    name = f"script_{file}"
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{file}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(name, *arguments, **environment):
    """A script as a user starts it."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
