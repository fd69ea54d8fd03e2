"""The console, on a terminal and off it."""

import io
import os
import pty
import subprocess
import sys

import pytest

from xylem.training.console import console, duration, format_row, printable

ROW = {"step": 40, "loss": 2.34567, "tokens_per_second": 12345.6, "mfu": 0.4321, "eta_seconds": 125.0,
       "checkpoint_age": 12.2, "learning_rate": 3e-4, "unknown": 7}  # fmt: skip


def test_console_line_has_every_figure_with_its_unit():
    line = format_row(ROW, 200)
    assert line == "step  40/200  loss 2.3457  tok/s 12,346  MFU 43.2%  eta 2m05s  saved 12s ago  lr 3.00e-04"
    assert format_row({"step": 1, "loss": 3.0, "mfu": None}, 9) == "step 1/9  loss 3.0000"


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0s"), (59.4, "59s"), (60, "1m00s"), (3599.6, "1h00m"), (7620, "2h07m"), (356400, "4d03h"), (-3, "0s"),
     (float("inf"), "?"), (float("nan"), "?")],
)  # fmt: skip
def test_console_duration_reads_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_console_off_a_terminal_prints_every_nth_and_the_last_step():
    stream = io.StringIO()
    with console(25, every=10, stream=stream) as shown:
        for step in range(1, 26):
            shown.update({"step": step, "loss": 1.0, **({"validation_loss": 2.0} if step == 13 else {})})
        shown.note("a sample")
    lines = stream.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines[:-1]] == ["step 10", "step 13", "step 20", "step 25"]
    assert lines[-1] == "a sample" and "\x1b" not in stream.getvalue()


def test_console_shows_control_characters_instead_of_obeying_them():
    assert printable("a\x1b[2Jb\r\nc\u202e\u4e2d") == "a\\x1b[2Jb\\r\nc\\u202e\u4e2d"


def test_console_survives_any_encoding_and_a_closed_stream():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with console(2, stream=stream) as shown:
        shown.note("caf\u00e9 \ud800")
        assert raw.getvalue() == b"caf\\xe9 \\ud800\n"
        stream.close()
        shown.update({"step": 2, "loss": 1.0})
        shown.note("still training")


SCRIPT = """
from xylem.training.console import console
with console(4, every=1) as shown:
    for step in range(1, 5):
        shown.update({"step": step, "loss": 1.0 / step, "checkpoint_age": 3.0})
        shown.note(f"note {step} [bold] " + chr(27) + "[31m")
"""


def in_terminal(term: str) -> str:
    """What the script writes when its stdout is a terminal of that kind."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=follower, env=environment) as process:
        os.close(follower)
        written = b""
        try:
            while chunk := os.read(leader, 65536):
                written += chunk
        except OSError:  # Linux: the other end is closed
            pass
        assert process.wait() == 0
    os.close(leader)
    return written.decode()


def test_console_on_a_terminal_redraws_one_line_below_the_notes():
    text = in_terminal("xterm-256color")
    assert "\x1b[" in text and "4/4" in text
    for step in range(1, 5):
        assert f"note {step} [bold] \\x1b[31m" in text


def test_console_on_a_dumb_terminal_is_plain():
    text = in_terminal("dumb")
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line.startswith("step")][-1] == "step 4/4  loss 0.2500  saved 3s ago"
