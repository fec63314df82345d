"""The scores as one HTML page for readers who know nothing of the project: explained, with figures, no outside files.

Figures are HTML and CSS, so that text keeps its size on a phone.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from ..evaluation.languages import GROUPINGS
from ..evaluation.results import ModelScores, Scores
from ..evaluation.tasks import TASKS
from .sentences import answers, counts, notes, reasons
from .tables import (
    alignment_by_language,
    alignment_table,
    group_table,
    language_table,
    overview_table,
    percent,
    short_names,
    signed,
    wins,
    yardstick,
)

View = dict[str, object]  # what a part of the template reads
METHODS = {
    "task head": "reads the language itself",
    "linear probe": "reads the language itself; a simple classifier was fitted on its frozen states, in English",
    "log-likelihood of the labels": "reads the language itself; the label that it would most likely write counts",
    "log-likelihood of the choices": "reads the language itself; the choice that it would most likely write counts",
    "generation": "reads the language itself and writes its answer",
    "translate-test": "the text is machine-translated into English first, then classified",
}
# Okabe and Ito's colours, told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A07000", "#3C8FC4")


def to_html(all_scores: Sequence[Scores]) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mtllm_fast.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tasks = [_task(scores, number) for number, scores in enumerate(all_scores)]
    first = all_scores[0]
    return environment.get_template("report.html.j2").render(
        title=", ".join(scores.task for scores in all_scores) + ": zero-shot scores by language",
        tasks=tasks,
        seeds=any(model.seeds > 1 for scores in all_scores for model in scores.models),
        references=list(dict.fromkeys(name for scores in all_scores if (name := yardstick(scores)) is not None)),
        alignment=any(task["alignment"] for task in tasks),
        labelled=any(scores.labels for scores in all_scores),
        resamples=first.resamples,
        versions=", ".join(f"{name} {number}" for name, number in first.versions.items()),
    )


def _task(scores: Scores, number: int) -> View:
    names, chance = short_names(scores), scores.chance
    return {
        "name": scores.task,
        "anchor": f"task-{number}",
        "about": getattr(TASKS.get(scores.task), "about", "")
        or "The task is to give each text one of the labels below.",
        "answers": f"Possible answers: {', '.join(scores.labels)}." if scores.labels else answers(scores),
        "split": scores.split,
        "source": scores.source,
        "languages": len(scores.languages),
        "rows": max((score.rows for model in scores.models for score in model.languages.values()), default=0),
        "chance": None if chance is None else percent(chance),
        "models": [
            {"name": names[model.name], "method": METHODS.get(model.method, model.method)} for model in scores.models
        ],
        "findings": _findings(scores, names),
        "overview": overview_table(scores),
        "reference": yardstick(scores),
        "gaps": [_gaps(scores, model, names) for model in scores.compared()] if scores.reference else [],
        "ranking": None if scores.reference else _ranking(scores, names),
        "heat": _heat(scores, names),
        "distribution": _distribution(scores, names, chance),
        "groups": [group_table(scores, by) for by in GROUPINGS if scores.models[0].groups.get(by)],
        "alignment": alignment_table(scores),
        "alignment_languages": alignment_by_language(scores),
        "table": language_table(scores),
        "not_run": [
            {"model": names[model.name], "reason": reason, "languages": codes, "count": len(codes)}
            for model in scores.models
            for reason, codes in reasons(model).items()
        ],
        "notes": [
            *notes(scores),
            *(
                f"{names[model.name]}, counted: {'; '.join(counted)}."
                for model in scores.models
                if (counted := counts(model))
            ),
        ],
    }


def _findings(scores: Scores, names: dict[str, str]) -> list[str]:
    """What the page shows, in sentences."""
    lines = []
    shared = scores.shared()
    ranked = [model for model in scores.models if model.overall("shared") is not None]
    ranked.sort(key=lambda model: -model.groups["overall"]["shared"].accuracy)
    if ranked:
        parts = [f"{names[model.name]} {percent(model.groups['overall']['shared'].accuracy)} %" for model in ranked]
        count = (
            f"{len(shared)} languages other than English" if len(shared) != 1 else "the one language besides English"
        )
        line = f"Right answers on average over {count} that every model could read: {', '.join(parts)}."
        guess = "" if scores.chance is None else f" Guessing blindly would give {percent(scores.chance)} %."
        lines.append(line + guess)
    against = yardstick(scores)
    for model in scores.compared() if against is not None else []:
        above, below, surely_above, surely_below = wins(model, scores.foreign())
        total = sum(1 for code in scores.foreign() if code in model.languages and model.languages[code].gap is not None)
        lines.append(
            f"{names[model.name]} is above {against} in {above} of {total} languages and below it in {below}. "
            f"Beyond what chance explains: above in {surely_above}, below in {surely_below}."
        )
    english = [
        f"{names[model.name]} {percent(model.languages[scores.english].accuracy)} %"
        for model in scores.models
        if scores.english in model.languages
    ]
    if english:
        lines.append(f"In English itself: {', '.join(english)}.")
    if fewer := scores.left_out():
        texts, where = sum(rows for rows, _ in fewer.values()), "language" if len(fewer) == 1 else "languages"
        lines.append(
            f"{texts:,} texts in {len(fewer)} {where} count for no model, since not every model has them; see Good to "
            "know."
        )
    left_out = {code for model in scores.models for code in model.skipped}
    if left_out:
        lines.append(f"{len(left_out)} of {len(scores.languages)} languages were not run by every model; see Not run.")
    return lines


def _where(scores: Scores, code: str) -> str:
    language = scores.language(code)
    return f"{language.name} ({code}), {language.family}, {language.script} script"


def _gaps(scores: Scores, model: ModelScores, names: dict[str, str]) -> View:
    """Bars of one model, the language with the highest gap first; places in percent of the track."""
    gaps = [
        (score.gap, code)
        for code in scores.foreign()
        if (score := model.languages.get(code)) is not None and score.gap is not None
    ]
    gaps.sort(key=lambda pair: (-pair[0].accuracy, pair[1]))
    widest = max((max(abs(gap.low), abs(gap.high)) for gap, _ in gaps), default=0.1)
    limit = max(0.05, math.ceil(widest * 20) / 20)

    def place(value: float) -> float:
        return round(50 + 50 * value / limit, 2)

    bars = []
    for gap, code in gaps:
        start, end = sorted((place(0), place(gap.accuracy)))
        p = f", p {gap.p_holm:.3f} after correction" if gap.p_holm is not None else ""
        span = f"[{signed(gap.low)}, {signed(gap.high)}]"
        bars.append(
            {
                "name": scores.language(code).name,
                "value": signed(gap.accuracy),
                "start": start,
                "width": round(end - start, 2),
                "low": place(gap.low),
                "span": round(place(gap.high) - place(gap.low), 2),
                "kind": ("up" if gap.accuracy >= 0 else "down") + (" sure" if gap.significant else ""),
                "hint": f"{_where(scores, code)}: {signed(gap.accuracy)} points {span}{p}",
            }
        )
    return {"model": names[model.name], "limit": f"{100 * limit:.0f}", "bars": bars}


def _ranking(scores: Scores, names: dict[str, str]) -> View:
    """Without a reference: bars of the first model's accuracy, best first."""
    model = scores.models[0]
    bars = []
    for code in sorted(model.languages, key=lambda code: (-model.languages[code].accuracy, code)):
        score = model.languages[code]
        low, high = score.accuracy_interval or (score.accuracy, score.accuracy)
        bars.append(
            {
                "name": scores.language(code).name,
                "value": percent(score.accuracy),
                "start": 0,
                "kind": "up sure",
                "width": round(100 * score.accuracy, 2),
                "low": round(100 * low, 2),
                "span": round(100 * (high - low), 2),
                "hint": f"{_where(scores, code)}: {percent(score.accuracy)} % [{percent(low)}, {percent(high)}]",
            }
        )
    return {"model": names[model.name], "bars": bars}


def _heat(scores: Scores, names: dict[str, str]) -> View:
    """Languages by family in panels side by side, a coloured cell per model."""
    values = [score.accuracy for model in scores.models for score in model.languages.values()]
    low = math.floor(20 * min(values, default=0)) / 20
    high = max(math.ceil(20 * max(values, default=1)) / 20, low + 0.05)

    def family(code: str) -> str:
        return scores.language(code).family

    def mean(code: str) -> float:
        ran = scores.of_language(code)
        return sum(score.accuracy for score in ran) / len(ran) if ran else -1.0

    sizes = Counter(map(family, scores.languages))
    codes = sorted(scores.languages, key=lambda code: (-sizes[family(code)], family(code), -mean(code), code))
    rows = []
    for index, code in enumerate(codes):
        cells = []
        for model in scores.models:
            score = model.languages.get(code)
            if score is None:
                cells.append({"text": "", "style": "", "hint": f"{names[model.name]}: {model.skipped.get(code, '-')}"})
                continue
            share = (score.accuracy - low) / (high - low)
            cells.append(
                {
                    "text": f"{100 * score.accuracy:.0f}",
                    "style": _shade(share),
                    "hint": f"{names[model.name]}, {_where(scores, code)}: {percent(score.accuracy)} %",
                }
            )
        first = index == 0 or family(codes[index - 1]) != family(code)
        rows.append(
            {
                "name": scores.language(code).name,
                "family": family(code) if first else "",
                "cells": cells,
                "english": code == scores.english,
                "hint": _where(scores, code),
            }
        )
    panels = 4 if len(rows) > 120 else 3 if len(rows) > 70 else 2 if len(rows) > 36 else 1
    # a family's name takes a line of its own, so panels of one height hold different numbers of languages
    heights = [2.2 if row["family"] else 1.0 for row in rows]
    wanted, starts, filled = sum(heights) / panels, [0], 0.0
    for index, height in enumerate(heights):
        if filled >= wanted * len(starts) and len(starts) < panels:
            starts.append(index)
            rows[index]["family"] = rows[index]["family"] or f"{family(codes[index])} (continued)"
        filled += height
    return {
        "models": [{"number": n + 1, "name": names[model.name]} for n, model in enumerate(scores.models)],
        "panels": [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)])],
        "low": f"{100 * low:.0f}",
        "high": f"{100 * high:.0f}",
        "scale": [_shade(step / 10) for step in range(11)],
    }


def _shade(share: float) -> str:
    """Pale sand to dark blue; the text stays readable on it."""
    share = min(max(share, 0.0), 1.0)
    stops = ((250, 243, 221), (145, 196, 205), (8, 64, 110))
    position = 2 * share
    a, b = (stops[0], stops[1]) if position <= 1 else (stops[1], stops[2])
    part = position if position <= 1 else position - 1
    colour = [round(x + (y - x) * part) for x, y in zip(a, b)]
    text = "#fff" if share > 0.62 else "#1c2430"
    return f"background:rgb({colour[0]},{colour[1]},{colour[2]});color:{text}"


def _distribution(scores: Scores, names: dict[str, str], chance: float | None) -> View:
    """Per model, how many languages lie in each band of accuracy."""
    bins = 40 if len(scores.languages) > 60 else 20
    lanes = []
    ran = {frozenset(model.languages) for model in scores.models}
    for number, model in enumerate(scores.models):
        values = sorted(score.accuracy for code, score in model.languages.items() if code != scores.english)
        if not values:
            continue
        counts = [0] * bins
        for value in values:
            counts[min(int(value * bins), bins - 1)] += 1
        median, width = statistics.median(values), 100 / bins
        lanes.append(
            {
                "name": names[model.name],
                "colour": COLOURS[number % len(COLOURS)],
                "median": round(100 * median, 2),
                "text": (f"{len(values)} languages: " if len(ran) > 1 else "")
                + f"median {percent(median)} %, lowest {percent(values[0])} %, highest {percent(values[-1])} %",
                "bars": [
                    {
                        "height": round(100 * count / max(counts), 1),
                        "count": count,
                        "hint": f"{count} languages between {k * width:g} and {(k + 1) * width:g} %",
                    }
                    for k, count in enumerate(counts)
                ],
            }
        )
    return {"lanes": lanes, "chance": None if chance is None else round(100 * chance, 2), "step": f"{100 / bins:g}"}
