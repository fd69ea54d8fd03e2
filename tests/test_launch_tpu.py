"""The training step compiles for a real TPU topology, and its bytes a chip are those the shardings promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xylem.errors import ConfigError

CHIPS, PARAMETERS = 8, 1_235_814_400
FLAGS = ("--topology", "v5e:2x4", "--batch-size", "8", "--data.sequence-length", "2048")


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    """``scripts/plan.py`` in a process of its own: libtpu reads its environment once."""
    script = Path(__file__).parents[1] / "scripts" / "plan.py"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, str(script), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_step_of_a_billion_parameters_compiles_for_eight_tpus_and_fits():
    done = run_plan("llama3_2_1b", *FLAGS, "--mesh.fsdp", "8")
    assert done.returncode == 0, done.stderr[-2000:]
    gib = {name: float(size) for name, size in re.findall(r"^  (\w+) +([\d.]+)$", done.stdout, re.MULTILINE)}
    masters_and_moments = 3 * 4 * PARAMETERS / CHIPS / 2**30
    assert gib["state"] == pytest.approx(masters_and_moments, rel=1e-2)
    assert gib["arguments"] == pytest.approx(masters_and_moments, rel=1e-2)
    assert gib["aliased"] == pytest.approx(gib["state"], rel=1e-2), "the old state's memory becomes the new one's"
    assert gib["total"] < gib["memory"] == 16.0
    assert re.search(r"collectives: .*all-gather \d+", done.stdout)
    assert done.stdout.rstrip().endswith("fits")


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_step_that_cannot_fit_says_what_to_change():
    done = run_plan("llama3_2_1b", *FLAGS, "--mesh.data", "8")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert re.search(
        r"error: topology: 'v5e:2x4' .* a chip has 15.75G, the compiler asks for 2\d.*G: lower", done.stderr
    )


def test_plan_without_libtpu_says_what_to_install(monkeypatch):
    from xylem.configs.pretrain import RUNS
    from xylem.training.plan import plan

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs libtpu: pip install 'xylem-lm\[plan\]'"):
        plan(RUNS["default"](), "v5e:2x4")
