"""Scores on the console, and written as JSON, CSV, LaTeX, Markdown, figures and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.results import Scores
from ..jobs.durable import replacing, write_text
from .html import to_html
from .numbers import to_csv, to_groups_csv
from .sentences import answers, limits, summary_lines, title
from .tables import language_table, tables

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 2


def print_scores(scores: Scores, console: Console | None = None) -> None:
    """Print the language table, the means, what was skipped and the notes."""
    from rich.console import Console

    console = console or Console()
    console.print(replace(language_table(scores, brief=True), title=title(scores)).console())
    for line in summary_lines(scores, rates=True):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def to_markdown(scores: Scores, figure: str | None = None) -> str:
    """The report as Markdown; `figure` is the path of an image to show, relative to the Markdown file."""
    lines = [
        f"# {title(scores)}",
        "",
        f"Source: `{scores.source}`. {answers(scores)} Scores in percent.",
        "",
        *(f"- {line.strip()}" for line in summary_lines(scores)),
        "",
    ]
    if figure:
        lines += [f"![Accuracy by language]({figure})", ""]
    for table in tables(scores):
        lines += [f"## {table.title}", "", *table.markdown(), "", *([table.note, ""] if table.note else [])]
    versions = ", ".join(f"{name} {number}" for name, number in scores.versions.items())
    return "\n".join([*lines, f"Made with {versions}." if versions else "", ""])


def to_latex(all_scores: Sequence[Scores]) -> str:
    """Every table as LaTeX, to be \\input into a document."""
    lines = ["% needs \\usepackage{booktabs,longtable}"]
    for scores in all_scores:
        for table in tables(scores):
            label = f"tab:{scores.task}-{table.title}".lower().replace(" ", "-").replace("_", "-")
            caption = f"{scores.task}, {scores.split}. {table.title}. {limits(scores)}{table.note}"
            lines += ["", *table.latex(caption, label)]
    return "\n".join(lines) + "\n"


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
    all_scores: Scores | Sequence[Scores], output: str | Path, *, overwrite: bool = False
) -> dict[str, Path]:
    """Write one evaluation, or the tasks of a suite, into the folder `output`, each file whole or not at all.

    Everything but `scores-times.json` is a function of the scores alone: the same scores give the same bytes.

    Returns:
        "html", "json", "csv", "groups", "latex", "markdown", "figure" (the first task's), "times" -> path.

    Raises:
        ValueError: `output` is a file, or it holds a report and `overwrite` is False.
        OSError: a file cannot be written.
    """
    from .score_figure import draw_scores

    listed, folder = _listed(all_scores), Path(output)
    check_output(output, overwrite=overwrite)
    endings = [".png"] if len(listed) == 1 else [f"-{scores.task}.png" for scores in listed]
    figures = [folder / f"scores{ending}" for ending in endings]
    times = {scores.task: scores.times() for scores in listed}
    texts = {
        "markdown": (".md", "\n".join(to_markdown(scores, figure.name) for scores, figure in zip(listed, figures))),
        "csv": (".csv", to_csv(listed)),
        "groups": ("-groups.csv", to_groups_csv(listed)),
        "latex": (".tex", to_latex(listed)),
        "html": (".html", to_html(listed)),
        "times": ("-times.json", json.dumps(times, ensure_ascii=False, indent=1) + "\n"),
        "json": (".json", to_json(listed)),  # last: it says that the report is complete
    }
    folder.mkdir(parents=True, exist_ok=True)
    for scores, figure in zip(listed, figures):
        with replacing(figure) as path:
            draw_scores(scores, path)
    paths = {}
    for name, (ending, text) in texts.items():
        paths[name] = folder / f"scores{ending}"
        write_text(paths[name], text)
    return {**paths, "figure": figures[0]}


def check_output(output: str | Path, *, overwrite: bool = False) -> None:
    """ValueError if a report cannot go to `output`; to be called before hours of evaluation."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(output)!r}: expected a folder, got a file")
    if not overwrite and (folder / "scores.json").exists():
        raise ValueError(
            f"output={str(output)!r}: holds a report already (scores.json); choose another folder or allow overwriting"
        )


def _listed(scores: Scores | Sequence[Scores]) -> list[Scores]:
    listed = [scores] if isinstance(scores, Scores) else list(scores)
    if not listed:
        raise ValueError("scores: there are none to report")
    return listed
