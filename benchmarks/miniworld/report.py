"""What the miniworld's experiment found: tables with intervals, which of the paper's claims hold, curves, crossings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtllm_fast.miniworld.languages import ENGLISH
from mtllm_fast.miniworld.world import World
from mtllm_fast.reporting.table import Table

# what stands in the matrix, in the order of the report
SYSTEMS = {
    "direct": "LLM, directly",
    "encoder_only": "MT encoder alone",
    "translate_test": "translate-test",
    "direct_stack": "stack, fine-tuned (neither stage 1 nor 3)",
    "no_adaptation": "stack, distilled without stage 1",
    "no_distillation": "stack after stage 1, fine-tuned",
    "full": "MT-LLM: stage 1, stage 3 by pooled MSE",
    "full_kl": "MT-LLM + KL of the heads",
    "full_kl_labelled": "MT-LLM + KL, stage 3 on the labelled texts alone",
}
# 97.5 % quantiles of Student's t by degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

CHANCE = 1 / len(World().categories)

Finished = dict[str, dict[str, dict[str, Any]]]  # seed -> name -> scores


class Estimate(NamedTuple):
    """A mean with the half-width of its 95 % t-interval (nan of a single value)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.half) else f" ± {100 * self.half:.1f}")


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and 95 % t-interval of independent values.

    Raises:
        ValueError: no values.
    """
    listed = list(values)
    if not listed:
        raise ValueError("values: none given")
    mean = sum(listed) / len(listed)
    if len(listed) == 1:
        return Estimate(mean, math.nan)
    spread = math.sqrt(sum((value - mean) ** 2 for value in listed) / (len(listed) - 1))
    quantile = _T[len(listed) - 2] if len(listed) - 2 < len(_T) else 1.96
    return Estimate(mean, quantile * spread / math.sqrt(len(listed)))


def crossing(xs: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The least x from which on `ours` stays above `theirs`, by linear interpolation; None where it never does."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    if gaps[-1] <= 0:
        return None
    last = max((index for index, gap in enumerate(gaps) if gap <= 0), default=None)
    if last is None:
        return float(xs[0])
    share = -gaps[last] / (gaps[last + 1] - gaps[last])
    return xs[last] + share * (xs[last + 1] - xs[last])


def read_scores(root: Path, part: str, prefix: str = "") -> Finished:
    """{seed: {name: scores}} of what a part has finished."""
    found: Finished = {}
    for path in sorted((root / part).glob(f"seed-*/scores/{prefix}*.json")):
        name = path.name.removesuffix(".json").removeprefix(prefix)
        found.setdefault(path.parent.parent.name.removeprefix("seed-"), {})[name] = json.loads(path.read_text())
    return found


def report(output: str | Path) -> str:
    """The report as Markdown; also written to `output`/report.md, with results.json and a figure per curve.

    Raises:
        ValueError: the folder holds no finished cell.
    """
    root = Path(output)
    lines = ["# Miniworld experiment", ""]
    results: dict[str, Any] = {"unit": "accuracy, 0 to 1", "interval": "95 % t-interval over seeds"}
    table = read_scores(root, "matrix")
    table = {seed: {k: v for k, v in row.items() if k in SYSTEMS} for seed, row in table.items()}
    if any(table.values()):
        lines += _matrix(table, results)
    for curve in CURVES:
        scores = read_scores(root, curve.folder, curve.prefix)
        if scores:
            lines += _curve(curve, scores, results, root)
    if len(results) == 2:
        raise ValueError(f"output={str(root)!r}: holds no finished cell of an experiment")
    lines += [
        "The world is a test bench for the machinery, generated and small; nothing here is evidence for or against the "
        "paper's claims about real languages. Seeds draw first weights and the order of texts; the world, its MT model "
        "and its LLM are the same throughout, so the intervals do not cover other worlds.",
        "",
    ]
    text = "\n".join(lines)
    (root / "report.md").write_text(text, encoding="utf-8")
    (root / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return text


def _matrix(table: Finished, results: dict[str, Any]) -> list[str]:
    foreign = [code for code in next(iter(next(iter(table.values())).values())) if code != ENGLISH]
    seeds = [seed for seed in table if all(name in table[seed] for name in SYSTEMS)]
    lines = [
        "## Systems",
        "",
        f"Accuracy in percent on the kind task (12 kinds, chance 8.3), {len(foreign)} languages, seeds "
        f"{', '.join(seeds) or 'none complete'}. ± over seeds is the 95 % t-interval of the mean over languages; "
        "± over languages that of the languages' means over seeds.",
        "",
    ]
    found: dict[str, Any] = {}
    cells = []
    for name, title in SYSTEMS.items():
        rows = [table[seed][name] for seed in seeds]
        if not rows:
            continue
        means = [_mean(row[code] for code in foreign) for row in rows]
        by_language = {code: _mean(row[code] for row in rows) for code in foreign}
        overall, languages = estimate(means), estimate(by_language.values())
        english = estimate(row[ENGLISH] for row in rows)
        found[name] = {
            "title": title,
            "english": english.mean,
            "foreign": overall.mean,
            "half_width_over_seeds": overall.half,
            "half_width_over_languages": languages.half,
            "by_seed": dict(zip(seeds, means, strict=True)),
            "by_language": by_language,
        }
        percents = (languages.half, min(by_language.values()), max(by_language.values()))
        cells.append([title, str(english), str(overall), *(f"{100 * value:.1f}" for value in percents)])
    header = ["system", "English", "foreign mean ± over seeds", "± over languages", "lowest", "highest"]
    lines += Table(header, cells).markdown()
    results["matrix"] = found
    if found:
        lines += ["", *_resources(found)]
        lines += ["", "## The paper's claims here", "", *_claims(found, results)]
    return [*lines, ""]


def _resources(found: dict[str, Any]) -> list[str]:
    """Foreign means of the languages with much and with little parallel text."""
    world, lines = World(), []
    for much, size in (("high", world.high), ("low", world.low)):
        codes = [code for code in found["full_kl"]["by_language"] if world.languages[code].resources == much]
        means = (
            f"{found[name]['title']} {100 * _mean(found[name]['by_language'][code] for code in codes):.1f}"
            for name in ("full", "full_kl", "translate_test")
        )
        lines.append(f"- {size:,} parallel texts ({len(codes)} languages): {', '.join(means)}")
    return lines


# claim, our system, the other, what the comparison leaves open
CLAIMS = (
    ("The stack reads foreign text better than the LLM does itself", "full", "direct", ""),
    ("The stack reads foreign text better than the MT encoder alone", "full", "encoder_only",
     "the encoder sees labelled texts alone, the stack unlabelled ones with the test nouns too"),
    ("The stack beats translate-test", "full", "translate_test", "in a clean grammar translation loses nothing"),
    ("With the KL of the heads the stack beats translate-test", "full_kl", "translate_test", "likewise"),
    ("Stage 1 helps: distilled with it against without it", "full_kl", "no_adaptation", ""),
    ("Stage 1 helps: fine-tuned with it against without it", "no_distillation", "direct_stack", ""),
    ("Task distillation beats direct fine-tuning", "full", "no_distillation",
     "distillation needs no labels and so reads four times the texts, with all nouns in them"),
    ("Task distillation beats direct fine-tuning on the same texts", "full_kl_labelled", "no_distillation", ""),
    ("The KL of the heads adds to the pooled MSE", "full_kl", "full", ""),
)  # fmt: skip


def _claims(found: dict[str, Any], results: dict[str, Any]) -> list[str]:
    lines, verdicts = [], []
    for claim, ours, theirs, note in CLAIMS:
        if ours not in found or theirs not in found:
            continue
        one, other = found[ours]["by_seed"], found[theirs]["by_seed"]
        gap = estimate(one[seed] - other[seed] for seed in one)
        if max(found[ours]["foreign"], found[theirs]["foreign"]) < 1.5 * CHANCE:
            verdict = "cannot be told, both are at chance"
        elif math.isnan(gap.half) or abs(gap.mean) <= gap.half:
            verdict = "cannot be told"
        else:
            verdict = "holds" if gap.mean > 0 else "does not hold"
        lines.append(
            f"- **{claim}: {verdict}.** {found[ours]['title']} against {found[theirs]['title']}: "
            f"{100 * gap.mean:+.1f} points{'' if math.isnan(gap.half) else f' ± {100 * gap.half:.1f}'}"
            f"{f' ({note})' if note else ''}."
        )
        verdicts.append(
            {"claim": claim, "verdict": verdict, "gap": gap.mean, "half_width": _number(gap.half), "note": note}
        )
    results["claims"] = verdicts
    return lines


class Curve(NamedTuple):
    """A condition that is varied. `x` reads a cell's name; `lines` are the systems' keys and titles."""

    name: str
    folder: str
    prefix: str
    title: str
    axis: str
    x: Callable[[str], float]
    lines: dict[str, str]
    note: str


BOTH = {"mt_llm": "MT-LLM + KL", "translate_test": "translate-test"}
CURVES = (
    Curve(
        "length", "length", "length-", "Longer texts", "number of clauses", float,
        {**BOTH, "translate_clauses": "translate-test, clause by clause"},
        "The task: of what kind are more than half of the things of a text? The MT model was trained on texts of one "
        "and two clauses and stops after some two, as sentence-level MT does on documents; the stack is trained on "
        "longer English and reads on. Cut into clauses by hand, the same texts lose nothing: where a text can be cut "
        "into sentences, translate-test has this cure. Greedy decoding.",
    ),
    Curve(
        "adaptation", "matrix", "adaptation-", "More adaptation", "number of steps of stage 1", float, BOTH,
        "The kind task, with stage 1 left out, as in the matrix, and longer; stage 3 and the teacher are the same.",
    ),
    Curve(
        "typos", "matrix", "typos-", "Typos", "share of letters changed", float, BOTH,
        "Letters of the foreign texts of the kind task are dropped, replaced or added at test time; all systems read "
        "the same texts, and none was trained on such.",
    ),
    Curve(
        "ambiguity", "ambiguity", "ambiguity-", "Words with two senses", "share of ambiguous nouns",
        lambda name: int(name) / 3, BOTH,
        "Texts about three things of one kind; some are named by a word that means a thing of another kind as well. "
        "The MT model has learned these words from parallel text without topics. It must choose a sense, and is right "
        "half of the time; the encoder need not choose.",
    ),
)  # fmt: skip


def _curve(curve: Curve, table: Finished, results: dict[str, Any], root: Path) -> list[str]:
    names = sorted({name for row in table.values() for name in row}, key=curve.x)
    seeds = [seed for seed in table if all(name in table[seed] for name in names)]
    if not seeds:
        return [f"## {curve.title}", "", "No seed is complete yet.", ""]
    xs = [curve.x(name) for name in names]
    runs = {  # system -> seed -> accuracy at each x
        system: {
            seed: [_mean(r[system] for r in table[seed][name]["languages"].values()) for name in names]
            for seed in seeds
        }
        for system in curve.lines
    }
    points = {system: [estimate(values) for values in zip(*run.values())] for system, run in runs.items()}
    ours, theirs = ([point.mean for point in points[system]] for system in BOTH)
    where = crossing(xs, ours, theirs)
    by_seed = {seed: crossing(xs, *(runs[system][seed] for system in BOTH)) for seed in seeds}
    languages = {
        code: crossing(
            xs,
            *([_mean(table[s][name]["languages"][code][system] for s in seeds) for name in names] for system in BOTH),
        )
        for code in table[seeds[0]][names[0]]["languages"]
    }
    results[curve.name] = {
        "axis": curve.axis,
        "x": xs,
        "seeds": seeds,
        **{system: [{"mean": p.mean, "half_width": _number(p.half)} for p in points[system]] for system in curve.lines},
        "crossing": where,
        "crossing_by_seed": by_seed,
        "crossing_by_language": languages,
    }
    extra = [key for key in ("teacher_english", "mt_llm_english") if key in table[seeds[0]][names[0]]]
    for key in extra:
        results[curve.name][key] = [_mean(table[seed][name][key] for seed in seeds) for name in names]
    lines = [f"## {curve.title}", "", curve.note, ""]
    lines += [f"Accuracy in percent, mean over languages ± 95 % over {len(seeds)} seed{'s' * (len(seeds) > 1)}:", ""]
    rows = [[title, *map(str, points[key])] for key, title in curve.lines.items()]
    titles = {"teacher_english": "teacher, in English", "mt_llm_english": "MT-LLM + KL, in English"}
    rows += [[titles[key], *(f"{100 * value:.1f}" for value in results[curve.name][key])] for key in extra]
    lines += Table([curve.axis, *(f"{x:g}" for x in xs)], rows).markdown()
    if where is None:
        verdict = f"**No crossing:** where the {curve.axis} is {xs[-1]:g}, MT-LLM is not ahead of translate-test."
        nearest = max(range(len(xs)), key=lambda i: ours[i] - theirs[i])
        verdict += f" It comes nearest at {xs[nearest]:g}, {100 * (ours[nearest] - theirs[nearest]):+.1f} points."
    else:
        at = [value for value in by_seed.values() if value is not None]
        ahead = sum(value is not None for value in languages.values())
        verdict = (
            f"**Crossing at {where:.2f}:** from there on MT-LLM is ahead of translate-test "
            f"({100 * (ours[-1] - theirs[-1]):+.1f} points at {xs[-1]:g}). Seeds cross between {min(at):.2f} and "
            f"{max(at):.2f} ({len(at)} of {len(seeds)} cross); {ahead} of {len(languages)} languages cross."
        )
    draw_curve(curve, xs, runs, where, root / f"{curve.name}.png")
    return [*lines, "", verdict, "", f"![{curve.title}]({curve.name}.png)", ""]


def draw_curve(
    curve: Curve, xs: Sequence[float], runs: dict[str, dict[str, list[float]]], where: float | None, path: Path
) -> None:
    """Accuracy against the condition, a thin line per seed and a thick one for their mean, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    # Okabe and Ito's colours; markers and dashes tell them apart in print
    styles = (("#0072B2", "o", "-"), ("#D55E00", "s", "-"), ("#999999", "^", "--"))
    for (system, title), (colour, marker, dash) in zip(curve.lines.items(), styles):
        for values in runs[system].values():
            axis.plot(xs, [100 * value for value in values], dash, color=colour, linewidth=0.7, alpha=0.5)
        means = [100 * _mean(values) for values in zip(*runs[system].values())]
        axis.plot(xs, means, dash, color=colour, marker=marker, label=title, markersize=5, linewidth=2)
    axis.axhline(100 * CHANCE, color="0.6", linestyle=":", linewidth=1)
    axis.text(xs[-1], 100 * CHANCE + 1, "chance", ha="right", color="0.4", fontsize=8)
    if where is not None:
        axis.axvline(where, color="0.3", linestyle="--", linewidth=1)
        axis.annotate(
            f"crossing at {where:.2f}",
            (where, 45),
            ha="left",
            va="top",
            fontsize=8,
            xytext=(3, 0),
            textcoords="offset points",
        )
    axis.set_xlabel(curve.axis)
    axis.set_ylabel("accuracy, %, mean of 8 languages")
    axis.set_ylim(0, 104)
    axis.set_title(curve.title, fontsize=10)
    axis.legend(fontsize=8, loc="lower left")
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def _mean(values: Iterable[float]) -> float:
    return estimate(values).mean


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
