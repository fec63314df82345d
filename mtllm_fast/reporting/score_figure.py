"""One figure of scores by language: a dot per model, languages sorted, readable for nine and for two hundred."""

from __future__ import annotations

import math
from pathlib import Path

from ..evaluation.results import Scores
from .sentences import limits

# Okabe and Ito's colours, told apart by colour-blind readers too; the markers differ for print
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
_ROWS_PER_PANEL = 52
_ROW_INCHES = 0.175


def sorted_languages(scores: Scores) -> list[str]:
    """Languages by the accuracy of the first model that ran them, best first; those that no model ran at the end."""

    def key(code: str) -> tuple[float, str]:
        ran = scores.of_language(code)
        return (-ran[0].accuracy if ran else math.inf, code)

    return sorted(scores.languages, key=key)


def draw_scores(scores: Scores, path: str | Path) -> None:
    """Draw accuracy by language into a PNG at `path`.

    Panels side by side hold up to 52 languages each. A dashed line is a model's mean over the non-English languages
    that all models ran, the dotted one chance (one over the number of labels, where there are labels).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    languages = sorted_languages(scores)
    panels = math.ceil(len(languages) / _ROWS_PER_PANEL)
    per_panel = math.ceil(len(languages) / panels)
    width = 7.0 if panels == 1 else 3.6 * panels
    height = per_panel * (_ROW_INCHES if panels > 1 else 0.26) + 1.5
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharex=True, squeeze=False)[0]
    over = scores.shared() if len(scores.models) > 1 else scores.foreign()
    several = len({frozenset(model.languages) for model in scores.models}) > 1
    of = f" of {len(over)}" if several else ""
    small = 7 if panels > 1 else 9
    for panel, axis in enumerate(axes):
        codes = languages[panel * per_panel : (panel + 1) * per_panel]
        for index, code in enumerate(codes):
            values = [100 * score.accuracy for score in scores.of_language(code)]
            if len(values) > 1:
                axis.plot([min(values), max(values)], [index, index], color="0.8", linewidth=1, zorder=1)
            if not values:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                reason = _reason(scores, code)
                axis.text(2, index, reason, va="center", fontsize=small - 1, style="italic", color="0.45", bbox=box)
        for number, model in enumerate(scores.models):
            colour, marker = _STYLES[number % len(_STYLES)]
            points = [
                (100 * model.languages[code].accuracy, index)
                for index, code in enumerate(codes)
                if code in model.languages
            ]
            mean = model.mean("accuracy", over)
            if mean is not None:
                axis.axvline(100 * mean, color=colour, linewidth=0.9, linestyle="--", zorder=1)
            label = f"{model.name} ({model.method})" if model.method != model.name else model.name
            axis.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                s=16 if panels > 1 else 34,
                color=colour,
                marker=marker,
                label=label + (f", mean{of} {100 * mean:.1f}" if mean is not None else ""),
                zorder=3,
            )
        if scores.chance is not None:
            chance = 100 * scores.chance
            axis.axvline(chance, color="0.4", linewidth=0.9, linestyle=":", label=f"chance {chance:.1f}", zorder=1)
        axis.set_yticks(range(len(codes)), [_label(scores, code) for code in codes], fontsize=small)
        for tick, code in zip(axis.get_yticklabels(), codes, strict=True):
            if code == scores.english:
                tick.set_fontweight("bold")
            elif not scores.of_language(code):
                tick.set_color("0.45")
        axis.set_ylim(per_panel - 0.4, -0.6)
        axis.set_xlim(0, 100)
        axis.tick_params(axis="x", labelsize=small)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_xlabel("accuracy, %", fontsize=small + 1)
    drawn = "" if scores.limit is None else f" ({limits(scores).strip(' .').lower()})"
    figure.suptitle(f"{scores.task} {scores.split}: accuracy by language{drawn}", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = len(labels) if panels > 2 else 1 if len(labels) > 2 else len(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _reason(scores: Scores, code: str) -> str:
    reason = next((model.skipped[code] for model in scores.models if code in model.skipped), "not run")
    return reason if len(reason) < 24 else "not run"


def _label(scores: Scores, code: str) -> str:
    mapped = next((score.mt_code for score in scores.of_language(code) if score.mapped), None)
    return f"{code} (as {mapped})" if mapped else code
