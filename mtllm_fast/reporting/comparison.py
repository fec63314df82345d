"""Systems beside each other: scores, what their training cost, and whether labels of the test language were used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..evaluation.results import Scores
from .table import Table
from .tables import overview_table


@dataclass(frozen=True)
class Facts:
    """What is known of a system besides its scores.

    Fields:
        labels_in_test_language: whether labelled rows of the languages that it is tested in were learned from.
        seconds, cpu_seconds: of its training, a mean over its seeds.
        failed: seeds whose training failed.
    """

    recipe: str
    labels_in_test_language: bool
    seconds: float
    cpu_seconds: float
    failed: int = 0


def comparison_table(scores: Scores, facts: Mapping[str, Facts]) -> Table:
    """The overview of a task with what is known of each system; "-" for one that no recipe made."""
    overview = overview_table(scores)
    name, *measured = overview.header
    header = [name, "recipe", "labels in test language", *measured, "training, s", "CPU-s"]
    rows = []
    for model, (shown, *cells) in zip(scores.models, overview.rows, strict=True):
        about = facts.get(model.name)
        if about is None:
            rows.append([shown, "-", "-", *cells, "-", "-"])
            continue
        labels = "yes" if about.labels_in_test_language else "no"
        cost = [f"{about.seconds:,.0f}", f"{about.cpu_seconds:,.0f}"]
        failed = f" ({about.failed} failed)" if about.failed else ""
        rows.append([f"{shown}{failed}", about.recipe, labels, *cells, *cost])
    note = (
        f"{overview.note} Training: wall and processor time of all steps, a mean over the seeds; a step that systems "
        "share was run once and is counted in each."
    )
    return Table(header, rows, overview.left + 2, overview.title, note)
