"""The tables of a report, once, and their Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.alignment import METRICS as ALIGNMENT
from ..evaluation.languages import GROUPINGS
from ..evaluation.results import METRICS, Gap, Interval, LanguageScore, ModelScores, Scores

METRIC_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
GROUPING_NAMES = {"family": "language family", "script": "script", "resource": "resource level"}


@dataclass
class Table:
    """Cells as text. `left`: how many columns, from the first, hold words, not numbers; `bold`: rows that stand out."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left: int = 1
    note: str = ""
    bold: set[int] = field(default_factory=set)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """Points with a sign; +0.0 and -0.0 are 0.0."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def with_interval(value: float, bounds: Interval) -> str:
    return f"{percent(value)} [{percent(bounds[0])}, {percent(bounds[1])}]"


def gap_text(gap: Gap | None, *, interval: bool = False) -> str:
    """The difference in points, with * where it is significant after Holm's correction."""
    if gap is None:
        return "-"
    bounds = f" [{signed(gap.low)}, {signed(gap.high)}]" if interval else ""
    return signed(gap.accuracy) + ("*" if gap.significant else "") + bounds


def rows_text(found: Sequence[LanguageScore]) -> str:
    """How many rows of a language all its scores are over, and out of how many where that is not all."""
    if not found:
        return "-"
    rows, available = found[0].rows, found[0].available
    return f"{rows} of {available}" if available else str(rows)


def short_names(scores: Scores) -> list[str]:
    """Model names for a table's head: the last part of a path where that still tells the models apart."""
    short = [Path(model.name).name or model.name for model in scores.models]
    return short if len(set(short)) == len(short) else [model.name for model in scores.models]


def wins(model: ModelScores, foreign: Sequence[str]) -> tuple[int, int, int, int]:
    """Non-English languages in which a model is above and below translate-test, and those in which significantly so."""
    gaps = [score.gap for code in foreign if (score := model.languages.get(code)) is not None and score.gap is not None]
    above, below = [gap for gap in gaps if gap.accuracy > 0], [gap for gap in gaps if gap.accuracy < 0]
    return len(above), len(below), sum(gap.significant for gap in above), sum(gap.significant for gap in below)


def overview_table(scores: Scores) -> Table:
    """One row per model: means over the languages that all were run in, and the comparison with translate-test."""
    seeds = any(model.seeds > 1 for model in scores.models)
    header = ["model", "read by", "languages", "accuracy", "macro-F1", "English accuracy"]
    header += ["seeds (sd)"] * seeds + ["gap to translate-test", "better", "worse"] * (scores.reference is not None)
    rows = []
    for name, model in zip(short_names(scores), scores.models):
        mean = model.overall("shared")
        english = model.languages.get(scores.english)
        row = [name, model.method, f"{len(model.languages)} of {len(scores.languages)}"]
        if mean is None:
            row += ["-", "-"]
        else:
            row += [
                with_interval(mean.accuracy, mean.accuracy_interval),
                with_interval(mean.macro_f1, mean.macro_f1_interval),
            ]
        row.append(percent(english.accuracy if english else None))
        if seeds:
            row.append(f"{model.seeds} ({percent(seed_sd(model))})")
        if scores.reference is not None:
            if model.name == scores.reference:
                row += ["", "", ""]
            else:
                above, below, surely_above, surely_below = wins(model, scores.foreign())
                row += [gap_text(mean.gap if mean else None, interval=True), f"{above} ({surely_above}*)"]
                row.append(f"{below} ({surely_below}*)")
        rows.append(row)
    note = (
        f"Means over the {len(scores.shared())} non-English languages that every model was run in, in percent, "
        "with 95 % bootstrap intervals."
    )
    if scores.reference is not None:
        note += " better, worse: languages above and below translate-test (* of them significantly)."
    return Table("Overview", header, rows, 2, note)


def seed_sd(model: ModelScores) -> float | None:
    """Standard deviation over seeds of the mean over languages, None for one seed."""
    if len(model.seed_means) < 2:
        return None
    mean = sum(model.seed_means) / len(model.seed_means)
    return float((sum((x - mean) ** 2 for x in model.seed_means) / (len(model.seed_means) - 1)) ** 0.5)


def group_table(scores: Scores, by: str) -> Table:
    """One row per family, script or resource level: mean accuracy of every model, and gaps to translate-test."""
    names = short_names(scores)
    compared = [(name, model) for name, model in zip(names, scores.models) if model.name != scores.reference]
    header = [GROUPING_NAMES[by], "languages", *names]
    if scores.reference is not None:
        header += [f"gap {name}" for name, _ in compared]
    rows = []
    groups = list(scores.models[0].groups.get(by, {}))
    for group in sorted(groups) if by == "resource" else groups:
        found = [model.groups[by][group] for model in scores.models]
        row = [group, str(found[0].languages), *(percent(one.accuracy) for one in found)]
        if scores.reference is not None:
            row += [gap_text(model.groups[by][group].gap, interval=True) for _, model in compared]
        rows.append(row)
    note = "Mean accuracy in percent over the languages of a group, languages that every model was run in."
    if scores.reference is not None:
        note += " gap: points above translate-test, with its 95 % interval."
    return Table(f"By {GROUPING_NAMES[by]}", header, rows, 1, note)


def language_table(scores: Scores) -> Table:
    """One row per language, then the means; languages that a model did not run have the reason."""
    names = short_names(scores)
    header = ["language", "code", "read as", "rows"]
    for name, model in zip(names, scores.models):
        header += [f"{name} accuracy", f"{name} macro-F1"]
        if scores.reference is not None and model.name != scores.reference:
            header.append(f"{name} gap")
    rows = []
    for code in scores.languages:
        found = [model.languages[code] for model in scores.models if code in model.languages]
        read_as = next((score.mt_code for score in found if score.mt_code), None) or "-"
        if any(score.mapped for score in found):
            read_as += " (mapped)"
        row = [scores.language_name(code), code, read_as, rows_text(found)]
        for model in scores.models:
            score, gap = model.languages.get(code), scores.reference not in (None, model.name)
            if score is None:
                row += [model.skipped.get(code, "-"), *["-"] * (1 + gap)]
            else:
                row += [percent(score.accuracy), percent(score.macro_f1), *[gap_text(score.gap)] * gap]
        rows.append(row)
    means = {"non_english": "non-English mean", "shared": "mean over the languages that all ran"}
    bold = set()
    for group, title in means.items():
        if group == "shared" and scores.shared() == scores.foreign():
            continue
        sizes = {mean.languages for model in scores.models if (mean := model.overall(group)) is not None}
        row = [f"{title} (of so many languages)" if len(sizes) > 1 else title, "", "", ""]
        for model in scores.models:
            mean, gap = model.overall(group), scores.reference not in (None, model.name)
            over = f" ({mean.languages})" if mean and len(sizes) > 1 else ""
            row += [percent(mean.accuracy) + over, percent(mean.macro_f1) + over] if mean else ["-", "-"]
            row += [gap_text(mean.gap if mean else None)] * gap
        bold.add(len(rows))
        rows.append(row)
    note = (
        "Percent; gap: points above translate-test, * significant at 5 % (see Method)."
        if scores.reference
        else "Percent."
    )
    if scores.left_out():
        note += " rows: those that every model has, on which all are compared."
    return Table("By language", header, rows, 3, note, bold)


def alignment_table(scores: Scores) -> Table | None:
    """One row per model: mean of each alignment metric over the non-English languages; None where none was computed."""
    codes = scores.aligned()
    rows = []
    for name, model in zip(short_names(scores), scores.models):
        if mean := model.mean_alignment(codes):
            rows.append([name, *(f"{mean[metric]:.3f}" for metric in ALIGNMENT)])
    if not rows:
        return None
    own = [code for model in scores.models for code in scores.foreign()
           if code in model.languages and model.languages[code].alignment]  # fmt: skip
    over = "the non-English languages"
    if set(own) != set(codes):
        over = f"the {len(codes)} non-English languages in which every model was compared with English"
    note = f"Means over {over}; 1 means that a text and its English translation are read alike."
    pairs = {one.aligned or one.rows for model in scores.models for code in codes
             if (one := model.languages.get(code)) is not None and one.alignment}  # fmt: skip
    if len(pairs) > 1:
        note += (
            f" Of {min(pairs)} to {max(pairs)} pairs of texts by language; among fewer, the nearest is easier to find."
        )
    return Table("Closeness to English inside the model", ["model", *ALIGNMENT.values()], rows, 1, note)


def tables(scores: Scores) -> list[Table]:
    """All tables of a task, the short ones first."""
    found = [overview_table(scores), alignment_table(scores)]
    found += [group_table(scores, by) for by in GROUPINGS if scores.models[0].groups.get(by)]
    return [table for table in (*found, language_table(scores)) if table is not None]


def to_markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = [" --- " if index < table.left else " ---: " for index in range(len(table.header))]
    rows = [
        [f"**{cell}**" if cell and index in table.bold else cell for cell in row]
        for index, row in enumerate(table.rows)
    ]
    return [line(table.header), "|" + "|".join(rule) + "|", *(line(row) for row in rows)]


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "’": "'", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "\n": " ",
}  # fmt: skip


def latex_escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(all_scores: Sequence[Scores]) -> str:
    """Every table as LaTeX (booktabs; long ones as longtable), to be \\input into a document."""
    lines = ["% needs \\usepackage{booktabs,longtable}"]
    for scores in all_scores:
        for table in tables(scores):
            label = f"tab:{scores.task}-{table.title}".lower().replace(" ", "-").replace("_", "-")
            caption = latex_escape(f"{scores.task}, {scores.split}. {table.title}. {limits(scores)}{table.note}")
            columns = "l" * table.left + "r" * (len(table.header) - table.left)
            head = " & ".join(_latex_cell(cell) for cell in table.header) + r" \\"
            body = []
            for index, row in enumerate(table.rows):
                if index in table.bold and index - 1 not in table.bold:
                    body.append(r"\midrule")
                body.append(" & ".join(_latex_cell(cell) for cell in row) + r" \\")
            if len(table.rows) > 40:
                lines += ["", rf"\begin{{longtable}}{{{columns}}}", rf"\caption{{{caption}}}\label{{{label}}}\\"]
                lines += [r"\toprule", head, r"\midrule", r"\endhead", *body, r"\bottomrule", r"\end{longtable}"]
            else:
                lines += ["", r"\begin{table}", r"\centering", rf"\caption{{{caption}}}\label{{{label}}}"]
                lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
                lines += [r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: str) -> str:
    text = latex_escape(cell)
    if text[:1] == "-" and text[1:2].isdigit():
        text = "$-$" + text[1:]
    return text.replace("[-", "[$-$").replace(", -", ", $-$").replace("*", "$^{*}$")


def limits(scores: Scores) -> str:
    """That not all rows were scored, for a caption; "" where they were."""
    if scores.limit is None:
        return ""
    which = "the first" if scores.limit_seed is None else "a random sample of"
    return f"Only {which} {scores.limit} rows of each language. "


def to_csv(all_scores: Sequence[Scores]) -> str:
    """One line per task, model and language: everything that was measured, as numbers.

    Columns at the end where there is something to say: limit (rows of each language that were drawn), rows_scored and
    rows_available (where they are more than `rows`), pairs (of parallel rows, where they are not `rows`).
    """
    header = ["task", "split", "model", "method", "seeds", "language", "name", "family", "script", "resource",
              "mt_code", "rows", *(f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high", "_sd")),
              "gap", "gap_low", "gap_high", "p", "p_holm", *ALIGNMENT, "skipped"]  # fmt: skip
    rows = []
    for scores in all_scores:
        for model in scores.models:
            for code in scores.languages:
                about = scores.described.get(code, {})
                row: dict[str, object] = {
                    "task": scores.task, "split": scores.split, "model": model.name, "method": model.method,
                    "seeds": model.seeds, "language": code, "skipped": model.skipped.get(code, ""),
                    "limit": scores.limit or "",
                    **{name: about.get(name, "") for name in ("name", "family", "script", "resource")},
                }  # fmt: skip
                if code in model.languages:
                    row |= _numbers(model, code)
                rows.append(row)
    return _csv(header, rows, _EXTRA)


_EXTRA = ("limit", "rows_scored", "rows_available", "pairs")


def _numbers(model: ModelScores, code: str) -> dict[str, object]:
    score = model.languages[code]
    row: dict[str, object] = {"mt_code": score.mt_code or "", "rows": score.rows}
    more = {"rows_scored": score.scored, "rows_available": score.available, "pairs": score.aligned}
    row |= {name: value for name, value in more.items() if value is not None}
    for metric in METRICS:
        low, high = getattr(score, f"{metric}_interval") or (None, None)
        values = {"": getattr(score, metric), "_low": low, "_high": high, "_sd": getattr(score, f"{metric}_sd")}
        row |= {metric + part: _number(value) for part, value in values.items()}
    if score.gap is not None:
        gap = score.gap
        row |= {"gap": _number(gap.accuracy), "gap_low": _number(gap.low), "gap_high": _number(gap.high)}
        row |= {"p": _number(gap.p), "p_holm": _number(gap.p_holm)}
    return row | {name: _number(value) for name, value in score.alignment.items()}


def to_groups_csv(all_scores: Sequence[Scores]) -> str:
    """One line per task, model and group of languages: means, intervals, gaps."""
    header = ["task", "split", "model", "grouping", "group", "languages",
              *(f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high")),
              "gap", "gap_low", "gap_high"]  # fmt: skip
    rows: list[dict[str, object]] = []
    for scores in all_scores:
        for model in scores.models:
            for by, groups in model.groups.items():
                for name, one in groups.items():
                    row: dict[str, object] = {"task": scores.task, "split": scores.split, "model": model.name,
                                              "grouping": by, "group": name, "languages": one.languages,
                                              "limit": scores.limit or ""}  # fmt: skip
                    for metric in METRICS:
                        low, high = getattr(one, f"{metric}_interval")
                        values = {"": getattr(one, metric), "_low": low, "_high": high}
                        row |= {metric + part: _number(value) for part, value in values.items()}
                    if one.gap is not None:
                        row |= {"gap": _number(one.gap.accuracy), "gap_low": _number(one.gap.low)}
                        row["gap_high"] = _number(one.gap.high)
                    rows.append(row)
    return _csv(header, rows, ("limit",))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _csv(header: Sequence[str], rows: Sequence[dict[str, object]], extra: Sequence[str]) -> str:
    """`extra`: columns that are left out where they are empty throughout."""
    header = [*header, *(name for name in extra if any(row.get(name, "") != "" for row in rows))]
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
