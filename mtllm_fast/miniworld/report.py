"""The demo's table, its verdict in words, and its files."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ..demo.report import Results, percent, points, print_table, write_files
from ..reporting.table import Table
from .world import World

if TYPE_CHECKING:
    from ..evaluation.results import Scores

READERS = {
    "direct": "LLM, directly",
    "encoder_only": "MT encoder alone",
    "translate_test": "translate-test",
    "mt_llm": "MT-LLM",
}
CAVEAT = (
    "The world is a test bench for the machinery, generated and small; it is not evidence for the paper's claims about "
    "real languages."
)


def summarise(
    scores: Scores, world: World, *, seconds: float, seed: int, from_scratch: bool, num_beams: int
) -> Results:
    """The demo's results as data. Accuracies are shares from 0 to 1; texts are task rows."""
    models = {model.name.replace("-", "_"): model for model in scores.models}
    foreign, english = scores.foreign(), scores.english
    languages = {
        code: {
            **{reader: models[reader].languages[code].accuracy for reader in READERS},
            "resources": world.languages[code].resources,
            "parallel_texts": world.high if world.languages[code].resources == "high" else world.low,
        }
        for code in foreign
    }
    speed = {}
    for reader in ("translate_test", "mt_llm"):
        timed = [models[reader].languages[code] for code in foreign]
        speed[reader] = sum(score.rows for score in timed) / sum(score.time_s for score in timed)
    return {
        "languages": languages,
        "mean": {reader: models[reader].mean("accuracy", foreign) for reader in READERS},
        "english": {
            "teacher": models["direct"].languages[english].accuracy,
            "encoder_only": models["encoder_only"].languages[english].accuracy,
            "mt_llm": models["mt_llm"].languages[english].accuracy,
        },
        "texts_per_s": speed,
        "seconds": seconds,
        "rows_per_language": models["mt_llm"].languages[english].rows,
        "chance": 1 / len(scores.labels),
        "unit": "accuracy, 0 to 1",
        "seed": seed,
        "from_scratch": from_scratch,
        "num_beams": num_beams,
        "versions": scores.versions,
    }


def verdict(results: Results) -> list[str]:
    """One sentence per comparison, whichever way it fell."""
    mean, english, speed = results["mean"], results["english"], results["texts_per_s"]
    languages = results["languages"]
    ours = mean["mt_llm"]
    lines = [
        f"MT-LLM against the LLM reading directly: {points(ours - mean['direct'])} on the mean of {len(languages)} "
        f"languages ({percent(ours)} against {percent(mean['direct'])}; chance is {percent(results['chance'])}).",
        f"MT-LLM against the MT encoder alone: {points(ours - mean['encoder_only'])} "
        f"({percent(ours)} against {percent(mean['encoder_only'])}).",
    ]
    gap = ours - mean["translate_test"]
    won = [code for code, row in languages.items() if row["mt_llm"] > row["translate_test"]]
    word = f"MT-LLM {'is ahead of' if gap > 0 else 'is behind' if gap < 0 else 'equals'} translate-test"
    lines.append(
        f"{word}: {points(gap)} ({percent(ours)} against {percent(mean['translate_test'])}), better in {len(won)} "
        f"of {len(languages)} languages{' (' + ', '.join(won) + ')' if won else ''}."
    )
    for name in ("high", "low"):
        part = [row for row in languages.values() if row["resources"] == name]
        much = "much" if name == "high" else "little"
        lines.append(
            f"  with {much} parallel text ({len(part)} languages): "
            f"MT-LLM {percent(fmean(row['mt_llm'] for row in part))}, "
            f"translate-test {percent(fmean(row['translate_test'] for row in part))}"
        )
    lines.append(
        f"The English teacher scores {percent(english['teacher'])}: MT-LLM is "
        f"{points(english['mt_llm'] - english['teacher'])} from it in English ({percent(english['mt_llm'])}) and "
        f"{points(ours - english['teacher'])} on the foreign mean."
    )
    lines.append(
        f"Speed: MT-LLM {speed['mt_llm']:,.0f} texts/s, translate-test {speed['translate_test']:,.0f}: "
        f"{speed['mt_llm'] / speed['translate_test']:.1f} times as many."
    )
    lines.append(
        f"Translate-test decodes with {results['num_beams']} beams, M2M100's default. The task names the kind of a "
        "thing whose noun has no labelled row; stage 3 needs no labels, "
        "and its English text has all nouns, three in five clauses in freer English: other orders, articles dropped."
    )
    lines.append(CAVEAT)
    return lines


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """Language, parallel texts, percentages by reader: English, the others, their mean; then texts per second."""
    english, speed = results["english"], results["texts_per_s"]
    rows: list[tuple[str, ...]] = [
        ("eng_Latn", "-", _cell(english["teacher"]), _cell(english["encoder_only"]), "-", _cell(english["mt_llm"]))
    ]
    for code, row in results["languages"].items():
        rows.append((code, f"{row['parallel_texts']:,}", *(_cell(row[reader]) for reader in READERS)))
    rows.append(("mean, non-English", "", *(_cell(results["mean"][reader]) for reader in READERS)))
    rows.append(("texts per second", "", "", "", f"{speed['translate_test']:,.0f}", f"{speed['mt_llm']:,.0f}"))
    return rows


HEADER = ("language", "parallel texts", *READERS.values())


def print_demo(results: Results) -> None:
    """The table and the verdict on the console."""
    header = [name.replace(" ", "\n", 1) for name in HEADER]
    print_table("Zero-shot accuracy, % (trained on English only)", header, table_rows(results), verdict(results))


def write_demo_report(results: Results, scores: Scores, root: Path) -> None:
    """Write results.json, report.md and scores.png under `root`."""
    lines = ["# Miniworld demo", "", "Zero-shot accuracy in percent; all models learned the task in English only.", ""]
    lines += [*Table(HEADER, table_rows(results)).markdown(), "", *(f"- {line.strip()}" for line in verdict(results))]
    write_files(results, scores, root, lines, f"{results['rows_per_language']} rows per language, ")


def _cell(value: float) -> str:
    return f"{100 * value:.1f}"
