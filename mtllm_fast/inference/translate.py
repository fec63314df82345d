"""Translate any number of texts into a file: resumable after any kill, shared by any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .records import FORMATS, Kind, Made, RecordFile, RecordReport, write_records
from .translator import Translation, Translator

__all__ = ["FORMATS", "Manner", "Source", "translate_file"]

COLUMNS: dict[str, Kind] = {
    **dict.fromkeys(("id", "language", "split", "field", "source", "translation"), "string"),
    "score": "float64",
}


@dataclass(frozen=True)
class Source:
    """A text to translate.

    Fields:
        id, split, field: what joins it to the row it is from (see `evaluation.translations`).
        language: the set's code, as it is written to the file; mt_code: what the MT model calls it.
    """

    text: str
    mt_code: str
    id: str
    language: str
    split: str | None = None
    field: str = "text"


@dataclass(frozen=True)
class Manner:
    """How texts are translated.

    Fields:
        target: language of the translations.
        scores: add the mean log probability of each translation, for one more pass of the decoder.
        window: texts that are sorted by length and saved together.
        keep, decoding: as for `Translator.translate`.
    """

    target: str = "eng_Latn"
    keep: Sequence[str] = ()
    scores: bool = True
    window: int = 1024
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """Plain data, without `decoding`."""
        return {"target": self.target, "window": self.window, "scores": self.scores, "keep": list(self.keep)}


def translate_file(
    translator: Translator,
    sources: Iterable[Source],
    output: str | Path,
    how: Manner,
    *,
    settings: Mapping[str, object],
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    total: int | None = None,
    progress: bool = False,
) -> RecordReport:
    """Write a record per text, in order: id, language, split, field, source, translation, score.

    What translations met the length limit is counted in `translator.unfinished`.

    Args:
        sources: the texts, the same at every call.
        output: .parquet or .jsonl.
        settings: plain data that tells the texts and the model apart from others; compared, like `how`, before a
            stopped run goes on.
        total: number of texts, for the bar.

    Raises:
        ValueError, Interrupted: as `write_records`, which says how a stopped run goes on.
    """
    options: dict[str, Any] = {"target": how.target, "keep": how.keep, **how.decoding}

    def make(first: int, window: list[Source]) -> Made:
        before = translator.truncated
        texts, codes = [source.text for source in window], [source.mt_code for source in window]
        if how.scores:
            translations = translator.translate_scored(texts, codes, **options)
        else:
            translations = [Translation(text) for text in translator.translate(texts, codes, **options)]
        records = [_record(source, translation) for source, translation in zip(window, translations, strict=True)]
        return Made(records, translator.truncated - before)

    return write_records(
        RecordFile(Path(output), "translate", COLUMNS, {"format": 1, **how.record(), **settings}, how.decoding),
        sources,
        make,
        window=how.window,
        overwrite=overwrite,
        rank=rank,
        world_size=world_size,
        total=total,
        progress=progress,
    )


def _record(source: Source, translation: Translation) -> dict[str, object]:
    return {
        "id": source.id,
        "language": source.language,
        "split": source.split,
        "field": source.field,
        "source": source.text,
        "translation": translation.text,
        "score": None if translation.score is None else round(translation.score, 6),
    }
