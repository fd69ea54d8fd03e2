"""``--cases``: what ``make test`` draws and what it leaves is the whole suite, each test once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOME = ("tests/test_files.py", "tests/data/test_spans.py")  # quick, with cases and without


@pytest.mark.slow
def test_what_is_drawn_and_what_is_left_are_all(tmp_path):
    passed = tmp_path / "passed"

    def names(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", *arguments, *SOME]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
        return [line for line in found.stdout.splitlines() if "::" in line]

    every = names("--collect-only")
    assert names("--collect-only", "--cases", "left", "--passed", str(passed)) == every, "nothing was drawn before"
    for workers in ("0", "2"):
        names("--cases", "drawn", "--passed", str(passed), "-n", workers)
        drawn = passed.read_text().splitlines()
        left = names("--collect-only", "--cases", "left", "--passed", str(passed))
        assert sorted(drawn + left) == sorted(every)
        tests = [name.split("[")[0] for name in drawn]
        assert len(set(tests)) == len(tests), "one case a test"
        assert {name.split("[")[0] for name in left} & set(tests), "some have several"
