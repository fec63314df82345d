"""Scores on the console, and written as JSON, CSV, LaTeX, Markdown, figures and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.results import METRICS, LanguageScore, ModelScores, Scores
from ..jobs.durable import replacing, write_text
from .tables import gap_text, percent, rows_text, short_names, tables, to_csv, to_groups_csv, to_latex
from .tables import to_markdown_table as markdown_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMAT = 2
_HEADS = {"accuracy": "acc.", "macro_f1": "F1"}
_GROUPS = {"all": "mean", "non_english": "non-English mean", "non_english_shared": "shared mean"}


def print_scores(scores: Scores, console: Console | None = None) -> None:
    """Print the language table, the means, what was skipped and the notes."""
    from rich.console import Console

    console = console or Console()
    console.print(language_table(scores))
    for line in summary_lines(scores, rates=True):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def language_table(scores: Scores) -> Table:
    """A rich table: a row per language (those not run with the reason), then the means. Scores are percentages.

    With more than two models only accuracy is shown, to fit a terminal; the written reports have both.
    """
    from rich.table import Table

    metrics = list(METRICS) if len(scores.models) <= 2 else ["accuracy"]
    table = Table(
        title=_title(scores), header_style="bold", row_styles=("", "dim") if len(scores.languages) > 20 else None
    )
    table.add_column("language", no_wrap=True)
    table.add_column("read as", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    for name in short_names(scores):
        for metric in metrics:
            table.add_column(f"{name}\n{_HEADS[metric]}", justify="right", min_width=5, overflow="fold")
    for cells in _language_rows(scores, metrics):
        table.add_row(*cells)
    table.add_section()
    for cells in _mean_rows(scores, metrics):
        table.add_row(*cells, style="bold")
    return table


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
            lines.append(f"  gap to translate-test: {points} points, mean over {mean.languages} languages")
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
    lines.extend(f"Note: {note}" for note in notes(scores))
    return lines


def counts(model: ModelScores) -> list[str]:
    """What was counted on the way: truncated texts, translations that are missing, blank texts."""
    counted = [f"{count:,} {name.replace('_', ' ')}" for name, count in model.counts.items() if count]
    blank = sum(score.blank for score in model.languages.values())
    if blank:
        counted.append(f"{blank:,} rows with a blank text (scored all the same)")
    return counted


def notes(scores: Scores) -> list[str]:
    """What a reader has to know: of the models, the data and the rows."""
    found = list(dict.fromkeys(note for model in scores.models for note in model.notes))
    found += scores.issues
    if scores.limit is not None and scores.limit_seed is None:
        found.append(f"only the first {scores.limit} rows of each language were scored.")
    elif scores.limit is not None:
        found.append(
            f"only {scores.limit} rows of each language were scored: a random sample (seed {scores.limit_seed}), drawn "
            "by id, so the same rows in every language that has them."
        )
    if left_out := scores.left_out():
        short = dict(zip((model.name for model in scores.models), short_names(scores)))
        lacking = [
            short[model.name]
            for model in scores.models
            if any(code in model.languages and not model.languages[code].scored for code in left_out)
        ]
        which = ", ".join(f"{code} {count} of {most}" for code, (count, most) in left_out.items())
        found.append(
            f"{sum(count for count, _ in left_out.values()):,} rows are left out of every score, because "
            f"{' and '.join(lacking)} lacks them: {which}. All models are compared on the rows that every one has."
        )
    return found


def to_markdown(scores: Scores, figure: str | None = None) -> str:
    """The report as Markdown; `figure` is the path of an image to show, relative to the Markdown file."""
    lines = [
        f"# {_title(scores)}",
        "",
        f"Source: `{scores.source}`. Labels: {', '.join(scores.labels)}. Scores in percent.",
        "",
        *(f"- {line.strip()}" for line in summary_lines(scores)),
        "",
    ]
    if figure:
        lines += [f"![Accuracy by language]({figure})", ""]
    for table in tables(scores):
        lines += [f"## {table.title}", "", *markdown_table(table), "", *([table.note, ""] if table.note else [])]
    versions = ", ".join(f"{name} {number}" for name, number in scores.versions.items())
    return "\n".join([*lines, f"Made with {versions}." if versions else "", ""])


def to_json(all_scores: Scores | Sequence[Scores]) -> str:
    content = {"format": FORMAT, "tasks": [scores.to_dict() for scores in _listed(all_scores)]}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def read_scores(path: str | Path) -> list[Scores]:
    """The scores of each task from a JSON file that `write_report` wrote. Their times are not in it.

    Raises:
        ValueError: no such file, or something else in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"scores={str(path)!r}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"scores={str(path)!r}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"scores={str(path)!r}: not a file written by this version of `mtllm evaluate`")
    return [Scores.from_dict(scores) for scores in content["tasks"]]


def write_report(
    all_scores: Scores | Sequence[Scores], output: str | Path, *, stem: str = "scores", overwrite: bool = False
) -> dict[str, Path]:
    """Write one evaluation, or the tasks of a suite, into the folder `output`, each file whole or not at all.

    Everything but `<stem>-times.json` is a function of the scores alone: the same scores give the same bytes.

    Returns:
        "html", "json", "csv", "groups", "latex", "markdown", "figure" (the first task's), "times" -> path.

    Raises:
        ValueError: `output` is a file, or it holds a report and `overwrite` is False.
        OSError: a file cannot be written.
    """
    from .html import to_html
    from .score_figure import draw_scores

    listed, folder = _listed(all_scores), Path(output)
    endings = {
        "html": ".html",
        "csv": ".csv",
        "groups": "-groups.csv",
        "latex": ".tex",
        "markdown": ".md",
        "times": "-times.json",
        "json": ".json",
    }
    paths = {name: folder / f"{stem}{ending}" for name, ending in endings.items()}
    check_output(output, stem=stem, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    figures = [folder / (f"{stem}.png" if len(listed) == 1 else f"{stem}-{one.task}.png") for one in listed]
    times = {scores.task: scores.times() for scores in listed}
    texts = {
        "markdown": "\n".join(to_markdown(scores, figure.name) for scores, figure in zip(listed, figures)),
        "csv": to_csv(listed),
        "groups": to_groups_csv(listed),
        "latex": to_latex(listed),
        "html": to_html(listed),
        "times": json.dumps(times, ensure_ascii=False, indent=1) + "\n",
        "json": to_json(listed),  # last: it says that the report is complete
    }
    for scores, figure in zip(listed, figures):
        with replacing(figure) as path:
            draw_scores(scores, path)
    for name, text in texts.items():
        write_text(paths[name], text)
    return {**paths, "figure": figures[0]}


def check_output(output: str | Path, *, stem: str = "scores", overwrite: bool = False) -> None:
    """ValueError if a report cannot go to `output`; to be called before hours of evaluation."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(output)!r}: expected a folder, got a file")
    if not overwrite and (folder / f"{stem}.json").exists():
        raise ValueError(
            f"output={str(output)!r}: holds a report already ({stem}.json); choose another folder or allow overwriting"
        )


def reasons(model: ModelScores) -> dict[str, list[str]]:
    """Why languages were not run -> which."""
    grouped: dict[str, list[str]] = {}
    for code, reason in model.skipped.items():
        # the code differs by language; one group for them all
        key = "MT code unknown to the model" if reason.startswith("MT code ") else reason
        grouped.setdefault(key, []).append(code)
    return grouped


def _listed(scores: Scores | Sequence[Scores]) -> list[Scores]:
    listed = [scores] if isinstance(scores, Scores) else list(scores)
    if not listed:
        raise ValueError("scores: there are none to report")
    return listed


def _title(scores: Scores) -> str:
    count = len(scores.languages)
    return f"{scores.task}, {scores.split}: {count} language{'' if count == 1 else 's'}, zero-shot"


def _language_rows(scores: Scores, metrics: Sequence[str]) -> list[list[str]]:
    rows = []
    for code in scores.languages:
        found: list[LanguageScore] = [model.languages[code] for model in scores.models if code in model.languages]
        read_as = next((score.mt_code for score in found if score.mt_code), None) or "-"
        if any(score.mapped for score in found):
            read_as += " (mapped)"
        cells = [code, read_as, rows_text(found)]
        for model in scores.models:
            if code in model.languages:
                cells += [percent(getattr(model.languages[code], metric)) for metric in metrics]
            else:
                cells += [model.skipped.get(code, "-")[:40], *["-"] * (len(metrics) - 1)]
        rows.append(cells)
    return rows


def _mean_rows(scores: Scores, metrics: Sequence[str]) -> list[list[str]]:
    means = [scores.means(model) for model in scores.models]
    rows: list[list[str]] = []
    for group, title in _GROUPS.items():
        if group == "non_english_shared" and scores.shared() == scores.foreign():
            continue  # the same as the line above
        if group not in means[0] or not any(mean[group]["languages"] for mean in means):
            continue
        several = len({mean[group]["languages"] for mean in means}) > 1  # each the mean of other languages
        cells = [title, "", "(languages)" if several else ""]
        for mean in means:
            over = f" ({mean[group]['languages']})" if several else ""
            cells += [percent(mean[group][metric]) + over for metric in metrics]
        rows.append(cells)
    return rows
