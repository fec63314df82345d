"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.alignment import METRICS as ALIGNMENT
from ..evaluation.languages import GROUPINGS
from ..evaluation.results import Gap, Interval, LanguageScore, ModelScores, Scores
from .table import Table

GROUPING_NAMES = {"family": "language family", "script": "script", "resource": "resource level"}
_TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
_HEADS = {"accuracy": "acc.", "macro_f1": "F1"}  # on a console
_MEANS = {"non_english": "non-English mean", "shared": "mean over the languages that all ran"}
_BRIEF_MEANS = {"all": "mean", "non_english": "non-English mean", "shared": "shared mean"}


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """Points with a sign; +0.0 and -0.0 are 0.0."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def with_interval(value: float | None, bounds: Interval | None) -> str:
    return "-" if bounds is None else f"{percent(value)} [{percent(bounds[0])}, {percent(bounds[1])}]"


def gap_text(gap: Gap | None, *, interval: bool = False) -> str:
    """The difference in points, with * where it is significant after Holm's correction."""
    if gap is None:
        return "-"
    bounds = f" [{signed(gap.low)}, {signed(gap.high)}]" if interval else ""
    return signed(gap.accuracy) + ("*" if gap.significant else "") + bounds


def rows_text(scores: Sequence[LanguageScore]) -> str:
    """How many rows of a language all its scores are over, and out of how many where that is not all."""
    if not scores:
        return "-"
    rows, available = scores[0].rows, scores[0].available
    return f"{rows} of {available}" if available else str(rows)


def short_names(scores: Scores) -> dict[str, str]:
    """Model names for a table's head: the last part of a path where that still tells the models apart."""
    short = {model.name: Path(model.name).name or model.name for model in scores.models}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def yardstick(scores: Scores) -> str | None:
    """Name of the model that the others are compared with, None without one."""
    return None if scores.reference is None else short_names(scores)[scores.reference]


def wins(model: ModelScores, foreign: Sequence[str]) -> tuple[int, int, int, int]:
    """Non-English languages in which a model is above and below the reference, and those in which significantly so."""
    gaps = [score.gap for code in foreign if (score := model.languages.get(code)) is not None and score.gap is not None]
    above, below = [gap for gap in gaps if gap.accuracy > 0], [gap for gap in gaps if gap.accuracy < 0]
    return len(above), len(below), sum(gap.significant for gap in above), sum(gap.significant for gap in below)


def overview_table(scores: Scores) -> Table:
    """One row per model: means over the languages that all were run in, and the comparison with the reference."""
    seeds = any(model.seeds > 1 for model in scores.models)
    header = ["model", "read by", "languages", *(_TITLES[metric] for metric in scores.metrics), "English accuracy"]
    against = yardstick(scores)
    header += ["seeds (sd)"] * seeds + [f"gap to {against}", "better", "worse"] * (against is not None)
    names, rows = short_names(scores), []
    for model in scores.models:
        mean, english = model.overall("shared"), model.languages.get(scores.english)
        row = [names[model.name], model.method, f"{len(model.languages)} of {len(scores.languages)}"]
        row += [
            "-" if mean is None else with_interval(getattr(mean, metric), getattr(mean, f"{metric}_interval"))
            for metric in scores.metrics
        ]
        row.append(percent(english.accuracy if english else None))
        if seeds:
            row.append(f"{model.seeds} ({percent(seed_sd(model))})")
        if model.name == scores.reference:
            row += ["", "", ""]
        elif scores.reference is not None:
            above, below, surely_above, surely_below = wins(model, scores.foreign())
            row.append(gap_text(mean.gap if mean else None, interval=True))
            row += [f"{above} ({surely_above}*)", f"{below} ({surely_below}*)"]
        rows.append(row)
    note = (
        f"Means over the {len(scores.shared())} non-English languages that every model was run in, in percent, "
        "with 95 % bootstrap intervals."
    )
    if against is not None:
        note += f" better, worse: languages above and below {against} (* of them significantly)."
    return Table(header, rows, 2, "Overview", note)


def seed_sd(model: ModelScores) -> float | None:
    """Standard deviation over seeds of the mean over languages, None for one seed."""
    if len(model.seed_means) < 2:
        return None
    mean = sum(model.seed_means) / len(model.seed_means)
    return float((sum((x - mean) ** 2 for x in model.seed_means) / (len(model.seed_means) - 1)) ** 0.5)


def group_table(scores: Scores, by: str) -> Table:
    """One row per family, script or resource level: mean accuracy of every model, and gaps to the reference."""
    names = short_names(scores)
    compared = scores.compared() if scores.reference is not None else []
    header = [GROUPING_NAMES[by], "languages", *names.values(), *(f"gap {names[model.name]}" for model in compared)]
    rows = []
    groups = list(scores.models[0].groups.get(by, {}))
    for group in sorted(groups) if by == "resource" else groups:
        means = [model.groups[by][group] for model in scores.models]
        row = [group, str(means[0].languages), *(percent(mean.accuracy) for mean in means)]
        rows.append([*row, *(gap_text(model.groups[by][group].gap, interval=True) for model in compared)])
    note = "Mean accuracy in percent over the languages of a group, languages that every model was run in."
    if scores.reference is not None:
        note += f" gap: points above {yardstick(scores)}, with its 95 % interval."
    return Table(header, rows, 1, f"By {GROUPING_NAMES[by]}", note)


def language_table(scores: Scores, *, brief: bool = False) -> Table:
    """One row per language, then the means; languages that a model did not run have the reason.

    `brief`: to fit a console; with more than two models only accuracy, and no gaps.
    """
    names = short_names(scores)
    metrics = scores.metrics if not brief or len(scores.models) <= 2 else ("accuracy",)
    heads = _HEADS if brief else _TITLES
    with_gap = [scores.reference not in (None, model.name) and not brief for model in scores.models]
    header = ["language", "read as", "rows"] if brief else ["language", "code", "read as", "rows"]
    for model, gap in zip(scores.models, with_gap, strict=True):
        header += [f"{names[model.name]}{chr(10) if brief else ' '}{heads[metric]}" for metric in metrics]
        header += [f"{names[model.name]} gap"] * gap
    rows = []
    for code in scores.languages:
        ran = scores.of_language(code)
        read_as = next((score.mt_code for score in ran if score.mt_code), None) or "-"
        if any(score.mapped for score in ran):
            read_as += " (mapped)"
        row = [code, read_as, rows_text(ran)] if brief else [scores.language(code).name, code, read_as, rows_text(ran)]
        for model, gap in zip(scores.models, with_gap, strict=True):
            if (score := model.languages.get(code)) is None:
                reason = model.skipped.get(code, "-")
                row += [reason[:40] if brief else reason, *["-"] * (len(metrics) - 1 + gap)]
            else:
                row += [percent(getattr(score, metric)) for metric in metrics] + [gap_text(score.gap)] * gap
        rows.append(row)
    means = _mean_rows(scores, metrics, with_gap, brief)
    note = (
        f"Percent; gap: points above {yardstick(scores)}, * significant at 5 % (see Method)."
        if scores.reference
        else "Percent."
    )
    if scores.left_out():
        note += " rows: those that every model has, on which all are compared."
    bold = set(range(len(rows), len(rows) + len(means)))
    return Table(header, rows + means, 2 if brief else 3, "By language", note, bold)


def _mean_rows(scores: Scores, metrics: Sequence[str], with_gap: Sequence[bool], brief: bool) -> list[list[str]]:
    rows = []
    for group, title in (_BRIEF_MEANS if brief else _MEANS).items():
        means = [model.overall(group) for model in scores.models]
        if group == "shared" and (scores.shared() == scores.foreign() or (brief and len(means) == 1)):
            continue  # the same as the row above
        if brief and not any(means):
            continue
        several = len({mean.languages for mean in means if mean is not None}) > 1  # each the mean of other languages
        if brief:
            row = [title, "", "(languages)" if several else ""]
        else:
            row = [f"{title} (of so many languages)" if several else title, "", "", ""]
        for mean, gap in zip(means, with_gap, strict=True):
            over = f" ({mean.languages})" if mean and several else ""
            row += [percent(getattr(mean, metric)) + over if mean else "-" for metric in metrics]
            row += [gap_text(mean.gap if mean else None)] * gap
        rows.append(row)
    return rows


def alignment_table(scores: Scores) -> Table | None:
    """One row per model: mean of each alignment metric over the non-English languages; None where none was computed."""
    codes, names = scores.aligned(), short_names(scores)
    means = {names[model.name]: model.mean_alignment(codes) for model in scores.models}
    rows = [[name, *(f"{mean[metric]:.3f}" for metric in ALIGNMENT)] for name, mean in means.items() if mean]
    if not rows:
        return None
    aligned = {code: [one for one in scores.of_language(code) if one.alignment] for code in scores.foreign()}
    over = "the non-English languages"
    if {code for code, there in aligned.items() if there} != set(codes):
        over = f"the {len(codes)} non-English languages in which every model was compared with English"
    note = f"Means over {over}; 1 means that a text and its English translation are read alike."
    pairs = {score.aligned or score.rows for code in codes for score in aligned[code]}
    if len(pairs) > 1:
        note += (
            f" Of {min(pairs)} to {max(pairs)} pairs of texts by language; among fewer, the nearest is easier to find."
        )
    return Table(["model", *ALIGNMENT.values()], rows, 1, "Closeness to English inside the model", note)


def alignment_by_language(scores: Scores) -> Table:
    """Retrieval, MEXA, cosine and CKA of every model in every language."""
    names = short_names(scores)
    models = [model for model in scores.models if model.mean_alignment(scores.foreign())]
    shown = {"to_english": "retrieval", "mexa": "MEXA", "cosine": "cosine", "cka": "CKA"}
    rows = []
    for code in scores.foreign():
        metrics = [model.languages[code].alignment if code in model.languages else {} for model in models]
        if any(metrics):
            cells = (f"{one[name]:.2f}" if name in one else "-" for one in metrics for name in shown)
            rows.append([scores.language(code).name, code, *cells])
    header = ["language", "code", *(f"{names[model.name]} {title}" for model in models for title in shown.values())]
    return Table(header, rows, 2, "Closeness to English by language")


def tables(scores: Scores) -> list[Table]:
    """All tables of a task, the short ones first."""
    groups = [group_table(scores, by) for by in GROUPINGS if scores.models[0].groups.get(by)]
    every = [overview_table(scores), alignment_table(scores), *groups, language_table(scores)]
    return [table for table in every if table is not None]
