"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, total: int | None, enabled: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar that the yielded function advances by rows; without `total` it shows the count and the rate."""
    if not enabled:
        yield lambda _: None
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
