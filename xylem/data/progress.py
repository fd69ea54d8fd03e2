"""Progress of long stages: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from xylem.files import Report

T = TypeVar("T")

_EVERY_SECONDS = 5.0


@contextmanager
def stage(name: str, report: Report, unit: str = "documents") -> Iterator[Callable[[int], None]]:
    """Announce a stage of unknown length; the function given counts what is done.

    On a terminal, and only where ``report`` is ``print`` itself, a rich spinner shows it; elsewhere ``report`` takes
    a line now and then, and one at the end.
    """
    started = time.monotonic()
    done, told = 0, started
    bar = task = None
    if report is print and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[count]}"))
        bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        task = bar.add_task(name, total=None, count="")
        bar.start()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if bar is not None and task is not None:
            bar.update(task, count=f"{done:,} {unit}")
        elif now - told > _EVERY_SECONDS:
            told = now
            report(f"{name}: {done:,} {unit}, {now - started:.0f} s")

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
    report(f"{name}: {done:,} {unit} in {time.monotonic() - started:.1f} s")


def counted(items: Iterable[T], advance: Callable[[int], None]) -> Iterator[T]:
    """The items unchanged, each counted."""
    for item in items:
        yield item
        advance(1)
