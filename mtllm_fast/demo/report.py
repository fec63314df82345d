"""The demo's table, what it says in words, and its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.languages import SCRIPTS, describe
from ..reporting.table import Table
from .rows import ENGLISH, TOPICS

if TYPE_CHECKING:
    from ..evaluation.results import LanguageScore, Scores

SYSTEMS = {
    "direct": "LLM directly",
    "encoder_probe": "encoder, probe",
    "encoder_only": "encoder, fine-tuned",
    "mt_llm": "MT-LLM",
}
Results = dict[str, Any]  # what results.json holds
HEADER = ("language", "n", *SYSTEMS.values())
TITLE = "Accuracy in %, trained on English only [95 % interval]"
CAVEAT = (
    "The test texts were written for this demo by a language model and not proofread by native speakers; intervals are "
    "95 % over the rows, of one run with one seed."
)


def summarise(scores: Sequence[Scores], translated: Scores | None, *, seconds: float, seed: int) -> Results:
    """The demo's results as data. Accuracies are shares from 0 to 1, intervals 95 %.

    Args:
        scores: the systems in English and the languages that the encoder knows; then in the others, if there are any.
        translated: translate-test of Portuguese, None where it was not run.
    """
    from ..models.packages.translate import PACKAGE

    rows: dict[str, dict[str, object]] = {}
    for part in scores:
        models = {model.name: model for model in part.models}
        for code in part.foreign():
            rows[code] = {name: models[name].languages[code].accuracy for name in SYSTEMS}
            rows[code] |= {"rows": models["mt_llm"].languages[code].rows, "encoder_knows": part is scores[0]}
            rows[code] |= {"intervals": {name: _interval(models[name].languages[code]) for name in SYSTEMS}}
            rows[code] |= {"name": describe(code).name, "script": describe(code).script}
    models = {model.name: model for model in scores[0].models}
    known = scores[0].foreign()
    groups = {name: model.overall("non_english") for name, model in models.items()}
    results = {
        "languages": rows,
        "mean": {name: group.accuracy for name, group in groups.items() if group is not None},
        "mean_of": known,
        "mean_intervals": {name: list(group.accuracy_interval) for name, group in groups.items() if group is not None},
        "english": {
            "teacher": models["direct"].languages[ENGLISH].accuracy,
            "rows": models["direct"].languages[ENGLISH].rows,
            "intervals": {name: _interval(models[name].languages[ENGLISH]) for name in SYSTEMS},
            **{name: models[name].languages[ENGLISH].accuracy for name in SYSTEMS if name != "direct"},
        },
        "translate_test": None,
        "texts_per_s": {name: models[name].rows / models[name].time_s for name in SYSTEMS},
        "seconds": seconds,
        "chance": 1 / len(TOPICS),
        "unit": "accuracy, 0 to 1",
        "seed": seed,
        "versions": scores[0].versions,
    }
    if translated is not None:
        code, score = next(iter(translated.models[0].languages.items()))
        results["translate_test"] = {
            "language": code,
            "accuracy": score.accuracy,
            "interval": _interval(score),
            "rows": score.rows,
            "by": PACKAGE,
        }
    return results


def verdict(results: Results) -> list[str]:
    """One sentence a comparison, whichever way it fell."""
    mean, english, known = results["mean"], results["english"], results["mean_of"]
    ours, bound = mean["mt_llm"], english["teacher"]
    lines = [
        f"English, the bound: the task teacher, which reads English itself, has {percent(bound)} on the same "
        f"{english['rows']} rows; MT-LLM has {percent(english['mt_llm'])} there."
    ]
    if known:
        where = f"mean of the {len(known)} languages that the encoder was trained on"
        lines.append(f"MT-LLM reads them at {percent(ours)} ({where}), trained on English alone:")
        for name, words in (
            ("direct", "the LLM reading them directly"),
            ("encoder_only", "the encoder alone, fine-tuned on the same English rows"),
            ("encoder_probe", "the encoder alone, frozen, with a linear probe"),
        ):
            lines.append(f"  {points(ours - mean[name])} against {words} ({percent(mean[name])})")
        lines.append(f"  {points(ours - bound)} against the teacher on the English of the same texts")
    others = [code for code in results["languages"] if code not in known]
    if others:
        values = ", ".join(f"{code} {percent(results['languages'][code]['mt_llm'])}" for code in others)
        lines.append(f"Not in the encoder's training, marked *, in no mean: {values}.")
    if (translation := results["translate_test"]) is not None:
        row = results["languages"][translation["language"]]
        lines.append(
            f"Translate-test by a real MT model, {translation['language']}: {percent(translation['accuracy'])} "
            f"({_text(translation['interval'])}); MT-LLM {percent(row['mt_llm'])}, {translation['rows']} rows."
        )
    speed = results["texts_per_s"]
    lines.append("Texts per second: " + ", ".join(f"{words} {speed[name]:.1f}" for name, words in SYSTEMS.items()))
    lines.append(f"Chance is {percent(results['chance'])}. {CAVEAT}")
    return lines


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """English, every other language, and the mean over those that the encoder knows; percentages with intervals."""
    english = results["english"]
    first = {"direct": english["teacher"], **{name: english[name] for name in SYSTEMS if name != "direct"}}
    rows = [(ENGLISH, str(english["rows"]), *_cells(first, english["intervals"]))]
    for code, row in results["languages"].items():
        star = "" if row["encoder_knows"] else " *"
        rows.append((code + star, str(row["rows"]), *_cells(row, row["intervals"])))
    if results["mean_of"]:
        count = f"mean of {len(results['mean_of'])}"
        rows.append((count, "", *_cells(results["mean"], results["mean_intervals"])))
    return rows


def print_demo(results: Results) -> None:
    """The table and the verdict on the console, narrow enough for 80 columns."""
    header = [name.replace(", ", ",\n").replace(" directly", "\ndirectly") for name in HEADER]
    print_table(TITLE, header, table_rows(results), verdict(results))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], sentences: Iterable[str]) -> None:
    """A table of accuracies on the console, English first and means set off, with what it says below."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as ConsoleTable

    console = Console()
    table = ConsoleTable(title=title, header_style="bold", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for index, row in enumerate(rows):
        mean = row[0].startswith("mean")
        if index == 1 or mean:
            table.add_section()
        table.add_row(*row, style="bold" if mean else None)
    console.print(table)
    for line in sentences:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_report(results: Results, scores: Scores, root: Path) -> None:
    """Write results.json, report.md and scores.png under `root`."""
    scripts = sorted({row["script"] for row in results["languages"].values()} | {SCRIPTS["Latn"]})
    about = f"{len(results['languages'])} languages besides English, scripts: {', '.join(scripts)}."
    head = ["# Demo: topics in many languages, learned in English", "", about, ""]
    head += [*Table(HEADER, table_rows(results)).markdown(), "", *(f"- {line.strip()}" for line in verdict(results))]
    write_files(results, scores, root, head)


def write_files(results: Results, scores: Scores, root: Path, lines: Sequence[str], rows: str = "") -> None:
    """Write results.json, scores.png, and `lines` with the figure and the circumstances as report.md, under `root`."""
    from ..reporting.score_figure import draw_scores

    draw_scores(scores, root / "scores.png")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    circumstances = f"{rows}{results['seconds']:.0f} s, seed {results['seed']}; {versions}."
    text = "\n".join([*lines, "", "![Accuracy by language](scores.png)", "", circumstances, ""])
    (root / "report.md").write_text(text, encoding="utf-8")
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _interval(score: LanguageScore) -> list[float] | None:
    return list(score.accuracy_interval) if score.accuracy_interval is not None else None


def _cells(values: Mapping[str, float], intervals: Mapping[str, Sequence[float] | None]) -> tuple[str, ...]:
    return tuple(f"{100 * values[name]:.0f} {_text(intervals[name])}".strip() for name in SYSTEMS)


def _text(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"[{100 * interval[0]:.0f},{100 * interval[1]:.0f}]"


def percent(value: float) -> str:
    """A share in percent, to a tenth."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f} points"
