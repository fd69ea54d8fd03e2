"""What a person watching the training sees: one live line on a terminal, a plain line every N steps elsewhere."""

import contextlib
import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# Label, key of the row and format of each figure; a narrow terminal cuts off the last. ASCII: any log shows it.
FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("loss", "loss", "{:.4f}".format),
    ("valid", "validation_loss", "{:.4f}".format),
    ("bits/byte", "validation_bits_per_byte", "{:.3f}".format),
    ("tok/s", "tokens_per_second", "{:,.0f}".format),
    ("MFU", "mfu", "{:.1%}".format),
    ("eta", "eta_seconds", lambda seconds: duration(seconds)),
    ("saved", "checkpoint_age", lambda seconds: f"{duration(seconds)} ago"),
    ("lr", "learning_rate", "{:.2e}".format),
    ("grad", "gradient_norm", "{:.2f}".format),
)


class Console(NamedTuple):
    """`update(row)` shows the figures of a step, `note(text)` leaves a line (or a sample) above them."""

    update: Callable[[Mapping[str, Any]], None]
    note: Callable[[str], None]


@contextlib.contextmanager
def console(total_steps: int, every: int = 10, stream: io.TextIOBase | None = None) -> Iterator[Console]:
    """Open the console for a run of `total_steps`; a context manager.

    A terminal that can redraw gets a live line with a progress bar. Anything else (a file, a pipe, `TERM=dumb`) gets
    a plain line every `every` steps and at the last step. A row has `step` and any of the keys of `FIGURES`; others are
    ignored. Validation figures stay on the live line until the next. A stream that is closed while training goes on
    (`| head`) ends the output, not the training.
    """
    out: Any = stream or sys.stdout or io.StringIO()  # a process may have no stdout at all
    if out.isatty():
        from rich.console import Console as Terminal

        terminal = Terminal(file=out, highlight=False)
        if not terminal.is_dumb_terminal:
            with _live(terminal, total_steps) as shown:
                yield shown
            return
    yield _plain(out, total_steps, every)


def format_row(row: Mapping[str, Any], total_steps: int) -> str:
    """A row as one plain line; figures that are absent or None are left out."""
    place = f"step {row['step']:>{len(str(total_steps))}}/{total_steps}"
    return "  ".join([place, *(f"{name} {text}" for name, text in _figures(row))])


def duration(seconds: float | int) -> str:
    """Seconds as people say them: 42s, 3m05s, 2h07m, 4d03h."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(max(seconds, 0.0))
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:02d}{small}"
    return f"{seconds}s"


def printable(text: str) -> str:
    """`text` with control characters made visible: what a model writes must not move the cursor or ring the bell."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _figures(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, form(row[key])) for name, key, form in FIGURES if row.get(key) is not None]


def _plain(stream: Any, total_steps: int, every: int) -> Console:
    open_ = [True]

    def write(text: str) -> None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if open_[0]:
            try:
                print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
            except (BrokenPipeError, ValueError):  # ValueError: write to a closed file
                open_[0] = False

    def update(row: Mapping[str, Any]) -> None:
        if row["step"] % every == 0 or row["step"] >= total_steps or row.get("validation_loss") is not None:
            write(format_row(row, total_steps))

    return Console(update, lambda text: write(printable(text)))


@contextlib.contextmanager
def _live(terminal: Any, total_steps: int) -> Iterator[Console]:
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    seen: dict[str, Any] = {}
    clock = {"row": time.monotonic()}

    def render() -> Table:
        line = Table.grid(padding=(0, 1))
        if not seen:
            line.add_row(Text("starting", style="dim"))
            return line
        # Age and remaining time go on between two steps.
        passed = time.monotonic() - clock["row"]
        now = dict(seen)
        for key, sign in (("checkpoint_age", 1), ("eta_seconds", -1)):
            if now.get(key) is not None:
                now[key] += sign * passed
        text = Text(f"{seen['step']}/{total_steps}", style="bold", no_wrap=True, overflow="ellipsis")
        for name, figure in _figures(now):
            text.append(f"  {name} ", style="dim").append(figure, style="bold cyan" if name == "loss" else "default")
        line.add_row(ProgressBar(total=total_steps, completed=seen["step"], width=12), text)
        return line

    def update(row: Mapping[str, Any]) -> None:
        seen.update({key: value for key, value in row.items() if value is not None})
        clock["row"] = time.monotonic()

    # stdout is left alone: note() is the one way to print above the line.
    with Live(get_renderable=render, console=terminal, refresh_per_second=4, redirect_stdout=False) as live:
        yield Console(update, lambda text: live.console.print(Text(printable(text)), soft_wrap=True))
        live.refresh()
