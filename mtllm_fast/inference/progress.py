"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_bar(description: str, total: int | None, enabled: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar that the yielded function advances by rows; without `total` it shows the count and the rate."""
    if not enabled:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield _lines(description, total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Rows(ProgressColumn):
        def render(self, task) -> Text:
            of = "" if task.total is None else f" of {task.total:,.0f}"
            rate = "" if not task.speed else f", {task.speed:,.0f} rows/s"
            return Text(f"{task.completed:,.0f}{of} rows{rate}")

    columns = (TextColumn("{task.description}"), BarColumn(), Rows(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda rows: bar.advance(task, rows)


def _lines(description: str, total: int | None, done: int) -> Callable[[int], None]:
    first, of = done, "" if total is None else f" of {total:,}"
    started = last = time.monotonic()

    def advance(rows: int) -> None:
        nonlocal done, last
        done += rows
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = (done - first) / (now - started)
            print(f"{description}: {done:,}{of} rows, {rate:,.0f} rows/s", file=sys.stderr, flush=True)

    return advance
