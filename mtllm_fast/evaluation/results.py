"""The scores of an evaluation as data: `Scores` -> `ModelScores` -> `LanguageScore`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .languages import Language, describe

NO_MT_CODE = "no MT code"
METRICS = ("accuracy", "macro_f1")
OPTIONAL = ("scored", "available", "aligned")  # of a LanguageScore: written only where they say something
Interval = tuple[float, float]


@dataclass(frozen=True)
class Gap:
    """Accuracy of a model minus that of the reference (translate-test, or another) on the same rows.

    Fields:
        accuracy: the difference, -1 to 1; low, high: its bootstrap interval.
        p: two-sided p-value of the paired test; p_holm: adjusted over the non-English languages of the model and task.
            None where not tested (English, and means over languages).
    """

    accuracy: float
    low: float
    high: float
    p: float | None = None
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < 0.05


@dataclass(frozen=True)
class LanguageScore:
    """One model in one language.

    Fields:
        mt_code: what the MT model was told the language is (None for a model that reads without MT tokens).
        mapped: whether `mt_code` comes from the caller's `language_map` or the tokenizer's fallbacks, not from the
            task's table.
        rows: number of rows that the scores are over: those that every model which ran this language has.
        accuracy, macro_f1: 0 to 1, means over the seeds; of a generated task the accuracy is the exact match, and there
            is no macro-F1.
        blank: rows with an empty text among all that the model was run on (scored all the same).
        accuracy_interval, macro_f1_interval: bootstrap intervals over the rows.
        accuracy_sd, macro_f1_sd: standard deviation over seeds (n - 1), None for one seed.
        gap: against the reference, None where there is none.
        alignment: metrics of `alignment.METRICS`, means over the seeds; empty where not asked for.
        time_s: seconds spent predicting, all seeds together.
        scored: rows that this model was run on, None where they are `rows`.
        available: rows that the split holds, None where they are `rows`.
        aligned: pairs of parallel rows behind `alignment`, None where they are `rows`.
    """

    mt_code: str | None
    mapped: bool
    rows: int
    accuracy: float
    macro_f1: float | None
    blank: int
    accuracy_interval: Interval | None = None
    macro_f1_interval: Interval | None = None
    accuracy_sd: float | None = None
    macro_f1_sd: float | None = None
    gap: Gap | None = None
    alignment: dict[str, float] = field(default_factory=dict)
    time_s: float = field(default=0.0, compare=False)
    scored: int | None = None
    available: int | None = None
    aligned: int | None = None


@dataclass(frozen=True)
class GroupScore:
    """Unweighted mean of one model over the languages of a group, with the bootstrap interval of that mean (rows
    resampled, languages fixed). `gap` is None where the reference lacks one of the languages."""

    languages: int
    accuracy: float
    accuracy_interval: Interval
    macro_f1: float | None
    macro_f1_interval: Interval | None
    gap: Gap | None = None


@dataclass
class ModelScores:
    """One model in all languages.

    Fields:
        name: as the caller named it.
        method: how its answers were read, e.g. "task head" (`Scorer.method`).
        languages: the set's code -> score.
        skipped: the set's code -> why it was not run.
        notes: what a reader of the table has to know.
        counts: things counted on the way, e.g. truncated texts, all seeds together.
        seeds: number of seeds behind the scores.
        seed_means: per seed, the mean accuracy over the shared non-English languages.
        groups: "all", "non_english", "shared", and "family", "script", "resource" with their groups below: means over
            languages. "shared" and the three groupings hold the non-English languages that every model was run in.
    """

    name: str
    method: str
    languages: dict[str, LanguageScore] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    seeds: int = 1
    seed_means: list[float] = field(default_factory=list)
    groups: dict[str, dict[str, GroupScore]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that were run, all seeds together."""
        return self.seeds * sum(score.scored or score.rows for score in self.languages.values())

    @property
    def time_s(self) -> float:
        return sum(score.time_s for score in self.languages.values())

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.time_s if self.time_s > 0 else 0.0

    def mean(self, metric: str = "accuracy", languages: Iterable[str] | None = None) -> float | None:
        """Unweighted mean over the languages run, or those of `languages` that were run; None where there are none."""
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r}: expected one of {', '.join(METRICS)}")
        chosen = self.languages if languages is None else [code for code in languages if code in self.languages]
        values = [getattr(self.languages[code], metric) for code in chosen]
        return sum(values) / len(values) if values and None not in values else None

    def overall(self, name: str) -> GroupScore | None:
        """The group "all", "non_english" or "shared"."""
        return self.groups.get("overall", {}).get(name)

    def mean_alignment(self, languages: Iterable[str]) -> dict[str, float]:
        """Mean of each alignment metric over those of `languages` that have it."""
        metrics = [score.alignment for code in languages if (score := self.languages.get(code)) and score.alignment]
        return {
            name: sum(values[name] for values in metrics) / len(metrics) for name in (metrics[0] if metrics else {})
        }


@dataclass
class Scores:
    """Models x languages on one task.

    Fields:
        task, source, split: what was evaluated; labels: in the order of the task, none where answers are written.
        english: the set's code of English, left out of the non-English means.
        languages: all languages asked for, whether run or not.
        language_map: explicit overrides, the set's code -> MT code.
        models: in the order given.
        limit: rows per language, None for all; limit_seed: of their draw, None for the first rows of a file.
        versions: package versions.
        reference: name of the model that the others are compared with: translate-test, unless another was named; None
            where there is none.
        resamples: of the bootstrap.
        issues: what is odd about the data, counted.
        described: the set's code -> the language.
    """

    task: str
    source: str
    split: str
    labels: tuple[str, ...]
    english: str
    languages: tuple[str, ...]
    language_map: dict[str, str]
    models: list[ModelScores]
    limit: int | None = None
    limit_seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    reference: str | None = None
    resamples: int = 0
    issues: list[str] = field(default_factory=list)
    described: dict[str, Language] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `METRICS` that the task has."""
        return METRICS if self.labels else ("accuracy",)

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing blindly, None where there is nothing to choose from."""
        return 1 / len(self.labels) if self.labels else None

    def foreign(self) -> list[str]:
        return [code for code in self.languages if code != self.english]

    def shared(self) -> list[str]:
        """Non-English languages that every model was run on: the ones a comparison of means may use."""
        return [code for code in self.foreign() if all(code in model.languages for model in self.models)]

    def without_mt_code(self) -> list[str]:
        """Languages that some model did not run because there is no MT code for them."""
        return [code for code in self.languages if any(m.skipped.get(code) == NO_MT_CODE for m in self.models)]

    def compared(self) -> list[ModelScores]:
        """The models other than the reference."""
        return [model for model in self.models if model.name != self.reference]

    def aligned(self) -> list[str]:
        """Non-English languages in which every model that was compared with English was."""
        models = [model for model in self.models if model.mean_alignment(self.foreign())]
        return [
            code
            for code in self.foreign()
            if models and all(code in model.languages and model.languages[code].alignment for model in models)
        ]

    def left_out(self) -> dict[str, tuple[int, int]]:
        """Language -> rows that some model has and another lacks, so that none is scored on them; and rows of the one
        that has most."""
        missing = {}
        for code in self.languages:
            ran = self.of_language(code)
            most = max((score.scored or score.rows for score in ran), default=0)
            if ran and most > ran[0].rows:
                missing[code] = (most - ran[0].rows, most)
        return missing

    def of_language(self, code: str) -> list[LanguageScore]:
        """The scores in one language of the models that were run in it."""
        return [model.languages[code] for model in self.models if code in model.languages]

    def language(self, code: str) -> Language:
        return self.described.get(code) or describe(code)

    def means(self, model: ModelScores) -> dict[str, dict[str, float | None]]:
        """Means of one model over all its languages, the non-English ones, and those shared with the other models."""
        groups: dict[str, list[str]] = {"all": list(self.languages), "non_english": self.foreign()}
        if len(self.models) > 1:
            groups["non_english_shared"] = self.shared()
        means: dict[str, dict[str, float | None]] = {}
        for name, codes in groups.items():
            ran = [code for code in codes if code in model.languages]
            means[name] = {"languages": len(ran), **{metric: model.mean(metric, ran) for metric in METRICS}}
        return means

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without times; `from_dict` reads it back (it ignores the derived means)."""
        content = asdict(self)
        if self.limit_seed is None:
            del content["limit_seed"]
        for language in content["described"].values():
            del language["code"]
        content["models"] = content.pop("models")  # at the end
        for model, values in zip(self.models, content["models"], strict=True):
            values |= {"mean": self.means(model), "rows": model.rows}
            for score in values["languages"].values():
                del score["time_s"]
                for name in OPTIONAL:
                    if score[name] is None:
                        del score[name]
        return content

    def times(self) -> dict[str, dict[str, object]]:
        """Seconds and rows per second by model, and seconds by language."""
        return {
            model.name: {
                "rows": model.rows,
                "time_s": model.time_s,
                "rows_per_s": model.rows_per_s,
                "languages_s": {code: score.time_s for code, score in model.languages.items()},
            }
            for model in self.models
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Scores:
        """Raises ValueError for data that `to_dict` did not write."""
        try:
            values = {field.name: content[field.name] for field in fields(cls) if field.name in content}
            values |= {"labels": tuple(content["labels"]), "languages": tuple(content["languages"])}
            values["models"] = [_model(model) for model in content["models"]]
            values["described"] = {
                code: Language(code, **about) for code, about in content.get("described", {}).items()
            }
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"scores: not a file written by `mtllm evaluate`: {type(error).__name__} {error}"
            ) from None


def _model(content: Mapping[str, Any]) -> ModelScores:
    values = {field.name: content[field.name] for field in fields(ModelScores) if field.name in content}
    values["languages"] = {code: LanguageScore(**_typed(score)) for code, score in content["languages"].items()}
    values["groups"] = {
        by: {name: GroupScore(**_typed(score)) for name, score in groups.items()}
        for by, groups in content.get("groups", {}).items()
    }
    return ModelScores(**values)


def _typed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists and mappings as the tuples and the `Gap` they were."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    if content.get("gap") is not None:
        values["gap"] = Gap(**content["gap"])
    return values
