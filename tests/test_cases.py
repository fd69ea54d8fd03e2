"""``--cases``: what ``make test`` draws and what it leaves is the whole suite, each test once."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOME = ("tests/training/test_finetune_runs.py", "tests/peft/test_compose.py")  # with cases and without, slow and not


@pytest.mark.slow
def test_what_is_drawn_and_what_is_left_are_all():
    draw = str(secrets.randbits(31))

    def collected(cases: str, seed: str = draw) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--cases", cases, *SOME]
        found = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"XYLEM_CASES": seed}, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout + found.stderr
        return [line for line in found.stdout.splitlines() if "::" in line]

    every, drawn, left = (collected(cases) for cases in ("all", "drawn", "left"))
    assert sorted(drawn + left) == sorted(every), draw
    tests = [name.split("[")[0] for name in drawn]
    assert len(set(tests)) == len(tests), "one case a test"
    assert {name.split("[")[0] for name in left} & set(tests), "some have several"
    assert collected("left", "") == every, "nothing was drawn before"
