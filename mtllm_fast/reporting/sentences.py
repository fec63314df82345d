"""What a report says beside its tables."""

from __future__ import annotations

from ..evaluation.answers import EXTRACTION
from ..evaluation.results import ModelScores, Scores
from .tables import gap_text, short_names, yardstick


def title(scores: Scores) -> str:
    count = len(scores.languages)
    return f"{scores.task}, {scores.split}: {count} language{'' if count == 1 else 's'}, zero-shot"


def answers(scores: Scores) -> str:
    """What there is to answer."""
    if scores.labels:
        return f"Labels: {', '.join(scores.labels)}."
    return f"Answers are written; accuracy is the exact match of {EXTRACTION}."


def limits(scores: Scores) -> str:
    """That not all rows were scored, for a caption; "" where they were."""
    if scores.limit is None:
        return ""
    which = "the first" if scores.limit_seed is None else "a random sample of"
    return f"Only {which} {scores.limit} rows of each language. "


def summary_lines(scores: Scores, *, rates: bool = False) -> list[str]:
    """Sentences under the table: how each model was read, languages not run and why, notes; with `rates`, rows per
    second."""
    lines = []
    for model in scores.models:
        ran = f"{len(model.languages)} of {len(scores.languages)} languages"
        seeds = f", {model.seeds} seeds" if model.seeds > 1 else ""
        rate = f", {model.rows_per_s:,.1f} rows/s" if rates else ""
        lines.append(f"{model.name} ({model.method}): {ran}, {model.rows:,} rows{seeds}{rate}")
        for reason, codes in reasons(model).items():
            lines.append(f"  not run, {reason}: {', '.join(codes)}")
        if counted := counts(model):
            lines.append(f"  counted: {'; '.join(counted)}")
        mean = model.overall("shared")
        if mean is not None and mean.gap is not None:
            points = gap_text(mean.gap, interval=True)
            lines.append(f"  gap to {yardstick(scores)}: {points} points, mean over {mean.languages} languages")
    mapped = {code: score.mt_code for model in scores.models for code, score in model.languages.items() if score.mapped}
    if mapped:
        lines.append(
            "Read as another language by an explicit mapping: " + ", ".join(f"{a} as {b}" for a, b in mapped.items())
        )
    without = [code for code in scores.without_mt_code() if code not in mapped]
    if without:
        lines.append(
            f"{', '.join(without)}: no MT code; name one with a language map (e.g. {without[0]}=<MT code>) to run them."
        )
    if len(scores.models) > 1 and len(scores.shared()) < len(scores.foreign()):
        lines.append(
            f"Compare models by the shared mean: over the {len(scores.shared())} non-English languages that all ran."
        )
    return lines + [f"Note: {note}" for note in notes(scores)]


def counts(model: ModelScores) -> list[str]:
    """What was counted on the way: truncated texts, translations that are missing, blank texts."""
    counted = [f"{count:,} {name.replace('_', ' ')}" for name, count in model.counts.items() if count]
    blank = sum(score.blank for score in model.languages.values())
    if blank:
        counted.append(f"{blank:,} rows with a blank text (scored all the same)")
    return counted


def notes(scores: Scores) -> list[str]:
    """What a reader has to know: of the models, the data and the rows."""
    lines = list(dict.fromkeys(note for model in scores.models for note in model.notes))
    lines += scores.issues
    if scores.limit is not None and scores.limit_seed is None:
        lines.append(f"only the first {scores.limit} rows of each language were scored.")
    elif scores.limit is not None:
        lines.append(
            f"only {scores.limit} rows of each language were scored: a random sample (seed {scores.limit_seed}), drawn "
            "by id, so the same rows in every language that has them."
        )
    if left_out := scores.left_out():
        names = short_names(scores)
        lacking = [
            names[model.name]
            for model in scores.models
            if any(code in model.languages and not model.languages[code].scored for code in left_out)
        ]
        which = ", ".join(f"{code} {count} of {most}" for code, (count, most) in left_out.items())
        lines.append(
            f"{sum(count for count, _ in left_out.values()):,} rows are left out of every score, because "
            f"{' and '.join(lacking)} lacks them: {which}. All models are compared on the rows that every one has."
        )
    return lines


def reasons(model: ModelScores) -> dict[str, list[str]]:
    """Why languages were not run -> which."""
    grouped: dict[str, list[str]] = {}
    for code, reason in model.skipped.items():
        # the code differs by language; one group for them all
        key = "MT code unknown to the model" if reason.startswith("MT code ") else reason
        grouped.setdefault(key, []).append(code)
    return grouped
