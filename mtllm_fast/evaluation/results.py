"""What an evaluation found, as data: `Scores` -> `ModelScores` -> `LanguageScore`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NO_MT_CODE = "no MT code"
METRICS = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class LanguageScore:
    """One model in one language.

    Fields:
        mt_code: what the MT model was told the language is (None for a model that reads without MT tokens).
        mapped: whether `mt_code` comes from the caller's `language_map` or the tokenizer's fallbacks, not from the
            task's table.
        rows: number of rows scored.
        accuracy, macro_f1: 0 to 1.
        blank: rows with an empty text among them (scored all the same).
        time_s: seconds spent predicting.
    """

    mt_code: str | None
    mapped: bool
    rows: int
    accuracy: float
    macro_f1: float
    blank: int
    time_s: float


@dataclass
class ModelScores:
    """One model in all languages.

    Fields:
        name: as the caller named it.
        method: "task head", "linear probe" or "translate-test".
        languages: the set's code -> score.
        skipped: the set's code -> why it was not run.
        notes: what a reader of the table has to know.
        counts: things counted on the way, e.g. truncated texts.
    """

    name: str
    method: str
    languages: dict[str, LanguageScore] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(score.rows for score in self.languages.values())

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
        return sum(values) / len(values) if values else None


@dataclass
class Scores:
    """Models x languages on one task.

    Fields:
        task, source, split: what was evaluated; labels: in the order of the task.
        english: the set's code of English, left out of the non-English means.
        languages: all languages asked for, whether run or not.
        language_map: explicit overrides, the set's code -> MT code.
        models: in the order given.
        limit: rows per language, None for all.
        versions: package versions.
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
    versions: dict[str, str] = field(default_factory=dict)

    def foreign(self) -> list[str]:
        return [code for code in self.languages if code != self.english]

    def shared(self) -> list[str]:
        """Non-English languages that every model was run on: the ones a comparison of means may use."""
        return [code for code in self.foreign() if all(code in model.languages for model in self.models)]

    def without_mt_code(self) -> list[str]:
        """Languages that some model did not run because there is no MT code for them."""
        return [code for code in self.languages if any(m.skipped.get(code) == NO_MT_CODE for m in self.models)]

    def means(self, model: ModelScores) -> dict[str, dict[str, Any]]:
        """Means of one model over all its languages, the non-English ones, and those shared with the other models."""
        groups: dict[str, list[str]] = {"all": list(self.languages), "non_english": self.foreign()}
        if len(self.models) > 1:
            groups["non_english_shared"] = self.shared()
        found: dict[str, dict[str, Any]] = {}
        for name, codes in groups.items():
            ran = [code for code in codes if code in model.languages]
            found[name] = {"languages": len(ran), **{metric: model.mean(metric, ran) for metric in METRICS}}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back (it ignores the derived means and rates)."""
        content = {name: value for name, value in asdict(self).items() if name != "models"}
        content["labels"], content["languages"] = list(self.labels), list(self.languages)
        content["models"] = [
            {**asdict(model), "mean": self.means(model), "rows": model.rows, "rows_per_s": model.rows_per_s}
            for model in self.models
        ]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Scores:
        """Raises ValueError for data that `to_dict` did not write."""
        try:
            models = [
                ModelScores(
                    name=model["name"],
                    method=model["method"],
                    languages={code: LanguageScore(**score) for code, score in model["languages"].items()},
                    skipped=dict(model["skipped"]),
                    notes=list(model["notes"]),
                    counts=dict(model["counts"]),
                )
                for model in content["models"]
            ]
            return cls(
                task=content["task"],
                source=content["source"],
                split=content["split"],
                labels=tuple(content["labels"]),
                english=content["english"],
                languages=tuple(content["languages"]),
                language_map=dict(content["language_map"]),
                models=models,
                limit=content.get("limit"),
                versions=dict(content.get("versions", {})),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"scores: not a file written by `mtllm evaluate`: {type(error).__name__} {error}"
            ) from None
