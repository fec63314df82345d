"""From cells to scores: means over seeds, intervals, and the comparison with translate-test or another reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .cells import Cell
from .languages import GROUPINGS, Language
from .metrics import accuracy, macro_f1
from .results import Gap, GroupScore, LanguageScore, ModelScores
from .statistics import holm, interval, macro_f1_samples, mean_samples, sign_flip_p

Samples = npt.NDArray[np.floating]  # (R,)


@dataclass(frozen=True)
class ModelCells:
    """A model's cells: per seed, the set's code -> cell; and per seed, code -> alignment metrics.

    Fields:
        pairs: code -> how many pairs of parallel rows the alignment is of.
        scored: code -> how many rows were run, where the cells hold fewer of them.
    """

    name: str
    method: str
    notes: Sequence[str]
    seeds: Sequence[Mapping[str, Cell]]
    alignment: Sequence[Mapping[str, Mapping[str, float]]] = ()
    pairs: Mapping[str, int] = field(default_factory=dict)
    scored: Mapping[str, int] = field(default_factory=dict)

    def run(self, code: str) -> list[Cell]:
        """The cells of a language in all seeds; [] where it was not run."""
        cells = [seed[code] for seed in self.seeds if code in seed]
        return cells if len(cells) == len(self.seeds) and not any(cell.skipped for cell in cells) else []

    def correct(self, code: str) -> npt.NDArray[np.int64]:  # (N,)
        """In how many seeds each row was classified right."""
        return np.sum([cell.predictions == cell.gold for cell in self.run(code)], axis=0, dtype=np.int64)


@dataclass
class _Summary:
    """A model's scores with the bootstrap samples behind them, by language."""

    scores: ModelScores
    accuracy: dict[str, Samples] = field(default_factory=dict)
    macro_f1: dict[str, Samples] = field(default_factory=dict)
    gap: dict[str, Samples] = field(default_factory=dict)


def summarise(
    models: Sequence[ModelCells],
    described: Mapping[str, Language],
    *,
    english: str,
    num_classes: int,
    reference: str | None,
    resamples: int,
    available: Mapping[str, int] | None = None,
) -> list[ModelScores]:
    """Scores of all models on one task, in each language on the rows that all models which ran it have.

    Args:
        described: the languages asked for, in order.
        num_classes: of the task; 0 for one whose answers are written, which has no macro-F1.
        reference: name of the model that the others are compared with, or None.
        available: the set's code -> rows that the split holds, whether scored or not.

    Raises:
        ValueError: models that have no row of a language in common.
    """
    models = _on_common_rows(models, described)
    summaries = [_summary(model, described, num_classes, resamples, available or {}) for model in models]
    against = next((model for model in models if model.name == reference), None)
    if against is not None:
        for model, summary in zip(models, summaries, strict=True):
            if model is not against:
                _compare(model, against, summary, english, resamples)
    foreign = [code for code in described if code != english]
    shared = [code for code in foreign if all(code in summary.scores.languages for summary in summaries)]
    for model, summary in zip(models, summaries, strict=True):
        overall = {"all": list(described), "non_english": foreign, "shared": shared}
        summary.scores.groups["overall"] = _groups(summary, overall)
        for by in GROUPINGS:
            groups: dict[str, list[str]] = {}
            for code in shared:
                groups.setdefault(described[code].group(by), []).append(code)
            summary.scores.groups[by] = _groups(summary, dict(sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))))
        if shared:
            summary.scores.seed_means = [
                float(np.mean([accuracy(seed[code].predictions, seed[code].gold) for code in shared]))
                for seed in model.seeds
            ]
    return [summary.scores for summary in summaries]


def _on_common_rows(models: Sequence[ModelCells], languages: Iterable[str]) -> list[ModelCells]:
    """The models with their cells cut to the rows that all of them have; as they are where those are the same."""
    seeds = [[dict(seed) for seed in model.seeds] for model in models]
    scored: list[dict[str, int]] = [dict(model.scored) for model in models]
    for code in languages:
        ran = [number for number, model in enumerate(models) if model.run(code)]
        cells = [cell for number in ran for cell in models[number].run(code)]
        if len({cell.ids for cell in cells}) < 2:
            continue
        places = _common(cells)
        if not len(places[0]):
            raise ValueError(f"{code}: {' and '.join(models[n].name for n in ran)} have no row in common, by their ids")
        golds = [cell.gold[rows] for cell, rows in zip(cells, places, strict=True)]
        assert all((gold == golds[0]).all() for gold in golds), f"{code}: one id, two right answers"
        cut = iter([_cut(cell, rows) for cell, rows in zip(cells, places, strict=True)])
        for number in ran:
            before = len(models[number].run(code)[0].ids)
            for seed in seeds[number]:
                seed[code] = next(cut)
            if before > len(places[0]):
                scored[number][code] = before
    return [replace(model, seeds=cut, scored=rows) for model, cut, rows in zip(models, seeds, scored, strict=True)]


def _common(cells: Sequence[Cell]) -> list[npt.NDArray[np.int64]]:
    """Per cell the positions of the rows that all have, in the order of the first cell.

    An id that occurs more than once counts where it does so equally often in all, and is then told by its number.
    """
    counts = [Counter(cell.ids) for cell in cells]
    places: list[dict[tuple[str, int], int]] = []
    for cell in cells:
        seen: Counter[str] = Counter()
        places.append({})
        for index, name in enumerate(cell.ids):
            places[-1][name, seen[name]] = index
            seen[name] += 1
    keys = [key for key in places[0] if all(count[key[0]] == counts[0][key[0]] for count in counts)]
    return [np.array([place[key] for key in keys], np.int64) for place in places]


def _cut(cell: Cell, rows: npt.NDArray[np.int64]) -> Cell:
    return replace(
        cell,
        logits=cell.logits[rows],
        predictions=cell.predictions[rows],
        gold=cell.gold[rows],
        ids=tuple(cell.ids[index] for index in rows.tolist()),
        answers=tuple(cell.answers[index] for index in rows.tolist()) if cell.answers else (),
    )


def _summary(
    model: ModelCells, described: Iterable[str], num_classes: int, resamples: int, available: Mapping[str, int]
) -> _Summary:
    scores = ModelScores(model.name, model.method, notes=list(model.notes), seeds=len(model.seeds))
    summary = _Summary(scores)
    counts: Counter[str] = Counter()
    for code in described:
        cells = model.run(code)
        if not cells:
            reasons = [seed[code].skipped for seed in model.seeds if code in seed and seed[code].skipped]
            some = f" in {len(reasons)} of {len(model.seeds)} seeds" if 0 < len(reasons) < len(model.seeds) else ""
            scores.skipped[code] = reasons[0] + some if reasons else "not run"
            continue
        for cell in cells:
            counts.update(cell.counts)
        hits = [accuracy(cell.predictions, cell.gold) for cell in cells]
        summary.accuracy[code] = mean_samples(model.correct(code) / len(cells), resamples)
        f1: list[float] = []
        if num_classes:
            f1 = [macro_f1(cell.predictions, cell.gold, num_classes) for cell in cells]
            samples = [macro_f1_samples(cell.predictions, cell.gold, num_classes, resamples) for cell in cells]
            # resamples of macro-F1 lie too low (a rare class can be missed altogether), which would add up over
            # languages
            summary.macro_f1[code] = np.mean(samples, axis=0) - np.mean(samples) + np.mean(f1)
        scores.languages[code] = LanguageScore(
            mt_code=cells[0].mt_code,
            mapped=cells[0].mapped,
            rows=len(cells[0].gold),
            accuracy=float(np.mean(hits)),
            macro_f1=float(np.mean(f1)) if f1 else None,
            blank=cells[0].blank,
            accuracy_interval=interval(summary.accuracy[code]),
            macro_f1_interval=interval(summary.macro_f1[code]) if f1 else None,
            accuracy_sd=float(np.std(hits, ddof=1)) if len(cells) > 1 else None,
            macro_f1_sd=float(np.std(f1, ddof=1)) if len(f1) > 1 else None,
            alignment=(metrics := _alignment(model, code)),
            scored=model.scored.get(code),
            available=rows if (rows := available.get(code, 0)) > len(cells[0].gold) else None,
            aligned=pairs if metrics and (pairs := model.pairs.get(code)) != len(cells[0].gold) else None,
            time_s=sum(cell.time_s for cell in cells),
        )
    scores.counts = dict(counts)
    return summary


def _alignment(model: ModelCells, code: str) -> dict[str, float]:
    """Means over the seeds; {} unless all of them were compared with English."""
    seeds = [seed[code] for seed in model.alignment if seed.get(code)]
    if len(seeds) < len(model.seeds):
        return {}
    return {name: float(np.mean([metrics[name] for metrics in seeds])) for name in (seeds[0] if seeds else {})}


def _compare(model: ModelCells, against: ModelCells, summary: _Summary, english: str, resamples: int) -> None:
    """Fill in the gaps of a model against the reference, language by language."""
    gaps: dict[str, Gap] = {}
    for code in summary.scores.languages:
        seeds, others = len(model.run(code)), len(against.run(code))
        if not others:
            continue
        # whole numbers: each side's count of right seeds, brought to the common denominator
        differences = model.correct(code) * others - against.correct(code) * seeds
        scale = seeds * others
        samples = mean_samples(differences / scale, resamples)
        p = None if code == english else sign_flip_p(differences)
        gaps[code] = Gap(float(differences.mean()) / scale, *interval(samples), p)
        summary.gap[code] = samples
    tested = [code for code, gap in gaps.items() if gap.p is not None]
    adjusted = dict(zip(tested, holm([gaps[code].p or 0.0 for code in tested]), strict=True))
    for code, gap in gaps.items():
        gap = replace(gap, p_holm=adjusted.get(code))
        summary.scores.languages[code] = replace(summary.scores.languages[code], gap=gap)


def _groups(summary: _Summary, groups: Mapping[str, Sequence[str]]) -> dict[str, GroupScore]:
    means = {}
    for name, members in groups.items():
        codes = [code for code in members if code in summary.scores.languages]
        if not codes:
            continue
        scores = [summary.scores.languages[code] for code in codes]
        compared = [code for code in codes if code in summary.gap]
        gap = None
        if len(compared) == len(codes):
            values = [score.gap.accuracy for score in scores if score.gap is not None]
            gap = Gap(float(np.mean(values)), *interval(np.mean([summary.gap[code] for code in compared], axis=0)))
        f1 = [score.macro_f1 for score in scores if score.macro_f1 is not None]
        means[name] = GroupScore(
            languages=len(codes),
            accuracy=float(np.mean([score.accuracy for score in scores])),
            accuracy_interval=interval(np.mean([summary.accuracy[code] for code in codes], axis=0)),
            macro_f1=float(np.mean(f1)) if f1 else None,
            macro_f1_interval=interval(np.mean([summary.macro_f1[code] for code in codes], axis=0)) if f1 else None,
            gap=gap,
        )
    return means
