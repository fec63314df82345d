"""Everything that was measured, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from ..evaluation.alignment import METRICS as ALIGNMENT
from ..evaluation.languages import GROUPINGS
from ..evaluation.results import METRICS, GroupScore, LanguageScore, Scores

Row = dict[str, object]


def to_csv(all_scores: Iterable[Scores]) -> str:
    """One line per task, model and language.

    Columns at the end where there is something to say: limit (rows of each language that were drawn), rows_scored and
    rows_available (where they are more than `rows`), pairs (of parallel rows, where they are not `rows`).
    """
    about = ["task", "split", "model", "method", "seeds", "language", "name", *GROUPINGS, "mt_code", "rows"]
    measured = [f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high", "_sd")]
    header = [*about, *measured, "gap", "gap_low", "gap_high", "p", "p_holm", *ALIGNMENT, "skipped"]
    rows: list[Row] = []
    for scores in all_scores:
        for model in scores.models:
            for code in scores.languages:
                language = scores.language(code)
                rows.append(
                    {
                        "task": scores.task,
                        "split": scores.split,
                        "model": model.name,
                        "method": model.method,
                        "seeds": model.seeds,
                        "language": code,
                        "name": language.name,
                        **{by: language.group(by) for by in GROUPINGS},
                        "skipped": model.skipped.get(code, ""),
                        "limit": scores.limit,
                        **(_of_language(model.languages[code]) if code in model.languages else {}),
                    }
                )
    return _csv(header, rows, ("limit", "rows_scored", "rows_available", "pairs"))


def to_groups_csv(all_scores: Iterable[Scores]) -> str:
    """One line per task, model and group of languages: means, intervals, gaps."""
    measured = [f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high")]
    header = ["task", "split", "model", "grouping", "group", "languages", *measured, "gap", "gap_low", "gap_high"]
    rows: list[Row] = []
    for scores in all_scores:
        for model in scores.models:
            for by, groups in model.groups.items():
                for name, group in groups.items():
                    rows.append(
                        {
                            "task": scores.task,
                            "split": scores.split,
                            "model": model.name,
                            "grouping": by,
                            "group": name,
                            "languages": group.languages,
                            "limit": scores.limit,
                            **_measured(group),
                        }
                    )
    return _csv(header, rows, ("limit",))


def _of_language(score: LanguageScore) -> Row:
    row = {"mt_code": score.mt_code, "rows": score.rows, **_measured(score)}
    row |= {"rows_scored": score.scored, "rows_available": score.available, "pairs": score.aligned}
    return row | {name: _number(value) for name, value in score.alignment.items()}


def _measured(score: LanguageScore | GroupScore) -> Row:
    row: Row = {}
    for metric in METRICS:
        low, high = getattr(score, f"{metric}_interval") or (None, None)
        values = {"": getattr(score, metric), "_low": low, "_high": high, "_sd": getattr(score, f"{metric}_sd", None)}
        row |= {metric + part: _number(value) for part, value in values.items()}
    if (gap := score.gap) is not None:
        values = {"gap": gap.accuracy, "gap_low": gap.low, "gap_high": gap.high, "p": gap.p, "p_holm": gap.p_holm}
        row |= {name: _number(value) for name, value in values.items()}
    return row


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _csv(header: Sequence[str], rows: Sequence[Row], extra: Sequence[str]) -> str:
    """`extra`: columns that are left out where they are empty throughout."""
    header = [*header, *(name for name in extra if any(row.get(name) is not None for row in rows))]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
