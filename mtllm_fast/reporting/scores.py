"""Scores as a console table, Markdown, JSON and a figure."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.results import METRICS, LanguageScore, ModelScores, Scores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
_HEADS = {"accuracy": "acc.", "macro_f1": "F1"}
_GROUPS = {"all": "mean", "non_english": "non-English mean", "non_english_shared": "shared mean"}


def print_scores(scores: Scores, console: Console | None = None) -> None:
    """Print the language table, the means, what was skipped and the notes."""
    from rich.console import Console

    console = console or Console()
    console.print(language_table(scores))
    for line in summary_lines(scores):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def language_table(scores: Scores) -> Table:
    """A rich table: a row per language (those not run with the reason), then the means. Scores are percentages.

    With more than two models only accuracy is shown, to fit a terminal; the Markdown and JSON reports have both.
    """
    from rich.table import Table

    metrics = list(_METRICS) if len(scores.models) <= 2 else ["accuracy"]
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


def summary_lines(scores: Scores) -> list[str]:
    """Sentences under the table: how each model was read, rows per second, languages not run and why, notes."""
    lines = []
    for model in scores.models:
        ran = f"{len(model.languages)} of {len(scores.languages)} languages"
        lines.append(f"{model.name} ({model.method}): {ran}, {model.rows:,} rows, {model.rows_per_s:,.1f} rows/s")
        for reason, codes in _by_reason(model).items():
            lines.append(f"  not run, {reason}: {', '.join(codes)}")
        counted = [f"{count:,} {name.replace('_', ' ')}" for name, count in model.counts.items() if count]
        blank = sum(score.blank for score in model.languages.values())
        if blank:
            counted.append(f"{blank:,} rows with a blank text (scored all the same)")
        if counted:
            lines.append(f"  counted: {'; '.join(counted)}")
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
    notes = dict.fromkeys(note for model in scores.models for note in model.notes)
    lines.extend(f"Note: {note}" for note in notes)
    if scores.limit is not None:
        lines.append(f"Note: only the first {scores.limit} rows of each language were scored.")
    return lines


def to_markdown(scores: Scores, figure: str | None = None) -> str:
    """The report as Markdown; `figure` is the path of an image to show, relative to the Markdown file."""
    lines = [
        f"# {_title(scores)}",
        "",
        f"Source: `{scores.source}`. Labels: {', '.join(scores.labels)}. Scores in percent.",
        "",
    ]
    header = [
        "model",
        "read by",
        "languages",
        *(f"{group} {name}" for group in ("non-English", "English") for name in _METRICS.values()),
        "rows/s",
    ]
    lines += _markdown_table(header, [_overview(scores, model) for model in scores.models])
    lines += ["", *(f"- {line.strip()}" for line in summary_lines(scores)), ""]
    if figure:
        lines += [f"![Accuracy by language]({figure})", ""]
    lines += ["## By language", ""]
    header = [
        "language",
        "read as",
        "rows",
        *(f"{model.name} {name}" for model in scores.models for name in _METRICS.values()),
    ]
    lines += _markdown_table(header, [*_language_rows(scores, METRICS), *_mean_rows(scores, METRICS)])
    versions = ", ".join(f"{name} {number}" for name, number in scores.versions.items())
    return "\n".join([*lines, "", f"Made with {versions}." if versions else "", ""])


def to_json(scores: Scores) -> str:
    return json.dumps(scores.to_dict(), ensure_ascii=False, indent=2) + "\n"


def read_scores(path: str | Path) -> Scores:
    """Scores from a file that `write_report` wrote.

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
    return Scores.from_dict(content)


def write_report(
    scores: Scores, output: str | Path, *, stem: str = "scores", overwrite: bool = False
) -> dict[str, Path]:
    """Write `<stem>.json`, `<stem>.md` and `<stem>.png` into the folder `output`, each whole or not at all.

    Returns:
        "json", "markdown", "figure" -> path.

    Raises:
        ValueError: `output` is a file, or it holds a report and `overwrite` is False.
    """
    from .score_figure import draw_scores

    folder = Path(output)
    paths = {"json": folder / f"{stem}.json", "markdown": folder / f"{stem}.md", "figure": folder / f"{stem}.png"}
    check_output(output, stem=stem, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    _atomic(paths["figure"], lambda path: draw_scores(scores, path))
    text = to_markdown(scores, figure=paths["figure"].name)
    _atomic(paths["markdown"], lambda path: path.write_text(text, encoding="utf-8"))
    _atomic(
        paths["json"], lambda path: path.write_text(to_json(scores), encoding="utf-8")
    )  # last: it says the report is complete
    return paths


def check_output(output: str | Path, *, stem: str = "scores", overwrite: bool = False) -> None:
    """ValueError if a report cannot go to `output`; to be called before hours of evaluation."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(output)!r}: expected a folder, got a file")
    if not overwrite and (folder / f"{stem}.json").exists():
        raise ValueError(
            f"output={str(output)!r}: holds a report already ({stem}.json); choose another folder or allow overwriting"
        )


def _atomic(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _title(scores: Scores) -> str:
    count = len(scores.languages)
    return f"{scores.task}, {scores.split}: {count} language{'' if count == 1 else 's'}, zero-shot"


def short_names(scores: Scores) -> list[str]:
    """Model names for a table's head: the last part of a path where that still tells the models apart."""
    short = [Path(model.name).name or model.name for model in scores.models]
    return short if len(set(short)) == len(short) else [model.name for model in scores.models]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _language_rows(scores: Scores, metrics: Sequence[str]) -> list[list[str]]:
    rows = []
    for code in scores.languages:
        found: list[LanguageScore] = [model.languages[code] for model in scores.models if code in model.languages]
        read_as = next((score.mt_code for score in found if score.mt_code), None) or "-"
        if any(score.mapped for score in found):
            read_as += " (mapped)"
        cells = [code, read_as, str(found[0].rows) if found else "-"]
        for model in scores.models:
            if code in model.languages:
                cells += [percent(getattr(model.languages[code], metric)) for metric in metrics]
            else:
                cells += [model.skipped.get(code, "-"), *["-"] * (len(metrics) - 1)]
        rows.append(cells)
    return rows


def _mean_rows(scores: Scores, metrics: Sequence[str]) -> list[list[str]]:
    means = [scores.means(model) for model in scores.models]
    rows = []
    for group, title in _GROUPS.items():
        if group == "non_english_shared" and scores.shared() == scores.foreign():
            continue  # the same as the line above
        if group not in means[0] or not any(mean[group]["languages"] for mean in means):
            continue
        cells = [title, "", ""]
        for mean in means:
            cells += [percent(mean[group][metric]) for metric in metrics]
        rows.append(cells)
    return rows


def _overview(scores: Scores, model: ModelScores) -> list[str]:
    foreign = scores.means(model)["non_english"]
    english = [percent(model.mean(metric, [scores.english])) for metric in _METRICS]
    return [
        model.name,
        model.method,
        f"{len(model.languages)} of {len(scores.languages)}",
        *(percent(foreign[metric]) for metric in _METRICS),
        *english,
        f"{model.rows_per_s:,.1f}",
    ]


def _by_reason(model: ModelScores) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for code, reason in model.skipped.items():
        # the code differs by language; one group for them all
        key = "MT code unknown to the model" if reason.startswith("MT code ") else reason
        grouped.setdefault(key, []).append(code)
    return grouped


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + " --- |" * len(header), *(line(cells) for cells in rows)]
