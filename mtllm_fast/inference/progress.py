"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS_BETWEEN_LINES = 30.0


class Advance(Protocol):
    def __call__(self, count: int, now: str = "") -> None:
        """So many more are done; `now` says what comes next."""


@contextmanager
def progress_bar(
    description: str, total: int | None, enabled: bool, done: int = 0, *, unit: str = "rows"
) -> Iterator[Advance]:
    """A bar that the yielded function advances; without `total` it shows the count and the rate."""
    if not enabled:
        yield lambda count, now="": None
        return
    if not sys.stderr.isatty():
        yield _lines(description, total, done, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Task) -> Text:
            of = "" if task.total is None else f" of {task.total:,.0f}"
            rate = "" if not task.speed else f", {_rate(task.speed)} {unit}/s"
            return Text(f"{task.completed:,.0f}{of} {unit}{rate}")

    columns = (TextColumn("{task.description}"), BarColumn(), Count(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count, now="": bar.update(task, advance=count, description=f"{description} {now}".strip())


def _lines(description: str, total: int | None, done: int, unit: str) -> Advance:
    first, of = done, "" if total is None else f" of {total:,}"
    started = last = time.monotonic()

    def advance(count: int, now: str = "") -> None:
        nonlocal done, last
        done += count
        time_s = time.monotonic()
        if time_s - last >= SECONDS_BETWEEN_LINES:
            last = time_s
            rate = _rate((done - first) / (time_s - started))
            next_up = f", now {now}" if now else ""
            print(f"{description}: {done:,}{of} {unit}, {rate} {unit}/s{next_up}", file=sys.stderr, flush=True)

    return advance


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 or per_second == 0 else f"{per_second:.2g}"
