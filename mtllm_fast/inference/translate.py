"""Translate any number of texts into a file: resumable after any kill, shared by any number of processes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..jobs.parts import Parts, clear
from .progress import progress_bar
from .stream import Interrupted
from .translator import Translation, Translator

FORMATS = (".parquet", ".jsonl")


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


@dataclass(frozen=True)
class TranslateReport:
    """What came of `translate_file`.

    Fields:
        texts: in the output; resumed: those of an earlier run.
        truncated: sources that were cut.
        unfinished: translations of this run that met the length limit before their end.
        complete: the output is written. False for a process whose share is done before that of others.
    """

    texts: int
    resumed: int
    truncated: int
    unfinished: int
    complete: bool = True


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
) -> TranslateReport:
    """Write a record per text, in order: id, language, split, field, source, translation, score.

    A run that was stopped, even by kill -9, goes on where it was when the same call is made again, and gives the same
    file as one that was not (on the same kind of machine with as many threads). What a window of texts gave is safe in
    `<output>.part` once it is done. Every process translates every world_size-th window; the last one joins them.

    Args:
        sources: the texts, the same at every call.
        output: .parquet or .jsonl.
        settings: plain data that tells the texts and the model apart from others; compared, like `how`, before a
            stopped run goes on.
        total: number of texts, for the bar.

    Raises:
        ValueError: the output exists, a stopped run had other settings, another process writes to it, no text, or the
            disk is full.
        Interrupted: Ctrl-C.
    """
    output = Path(output)
    if output.suffix not in FORMATS:
        raise ValueError(f"output={str(output)!r}: expected a name ending in {' or '.join(FORMATS)}")
    if how.window < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"window={how.window}, rank={rank}, world_size={world_size}: expected window >= 1, a rank below"
        )
    if overwrite:
        if world_size > 1:
            raise ValueError("overwrite with several processes: delete the output and its .part folder first")
        clear(output)
    settings = {"format": 1, **how.record(), **settings}
    parts = Parts(output, {**settings, **how.decoding}, rank=rank, replace=overwrite)
    resumed, unfinished = parts.rows(), translator.unfinished
    try:
        if not parts.complete():
            with progress_bar("translate", total, progress, resumed) as advance:
                _translate(parts, translator, sources, how, rank, world_size, advance)
        if not (parts.lock_for_joining() and parts.complete()):
            return TranslateReport(parts.rows(), resumed, parts.truncated(), 0, complete=False)
        texts, truncated = parts.rows(), parts.truncated()
        if not texts:
            raise ValueError("input: holds no text to translate")
        if not parts.joined:
            if output.suffix == ".parquet":
                _join_parquet(parts, settings)
            else:
                _join_lines(parts)
        parts.remove()
        return TranslateReport(texts, resumed, truncated, translator.unfinished - unfinished)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {parts.rows():,} texts are saved in {parts.folder}, the same command goes on from there"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise ValueError(
            f"output={str(output)!r}: cannot be written ({error.strerror}); {parts.rows():,} texts are saved in "
            f"{parts.folder}, the same command goes on from there"
        ) from error
    finally:
        if not parts.rows() and world_size == 1:
            parts.remove()
        parts.close()


def _translate(
    parts: Parts,
    translator: Translator,
    sources: Iterable[Source],
    how: Manner,
    rank: int,
    world_size: int,
    advance: Callable[[int], None],
) -> None:
    """Translate the windows that are missing."""
    options: dict[str, Any] = {"target": how.target, "keep": how.keep, **how.decoding}
    stream, index, rows = iter(sources), 0, 0
    while window := list(islice(stream, how.window)):
        if index % world_size == rank and index not in parts.done:
            before = translator.truncated
            texts, codes = [source.text for source in window], [source.mt_code for source in window]
            if how.scores:
                translations = translator.translate_scored(texts, codes, **options)
            else:
                translations = [Translation(text) for text in translator.translate(texts, codes, **options)]
            lines = [_line(source, translation) for source, translation in zip(window, translations, strict=True)]
            parts.append(index, len(window), translator.truncated - before, ["".join(lines).encode()])
            advance(len(window))
        index, rows = index + 1, rows + len(window)
    parts.finish(index, rows)


def _line(source: Source, translation: Translation) -> str:
    record = {
        "id": source.id,
        "language": source.language,
        "split": source.split,
        "field": source.field,
        "source": source.text,
        "translation": translation.text,
        "score": None if translation.score is None else round(translation.score, 6),
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _join_lines(parts: Parts) -> None:
    records = parts.records()
    path = parts.only_file(records)
    if path is None:
        path = parts.folder / "output"
        with path.open("wb") as handle:
            handle.writelines(parts.blocks(records))
    parts.replace_output(path)


def _join_parquet(parts: Parts, settings: Mapping[str, object]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    names = ("id", "language", "split", "field", "source", "translation")
    schema = pa.schema(
        [*((name, pa.string()) for name in names), ("score", pa.float64())],
        metadata={"mtllm_translate": json.dumps(settings, sort_keys=True)},
    )
    path = parts.folder / "output"
    with parquet.ParquetWriter(path, schema) as writer:
        for block in parts.blocks(parts.records()):
            rows = [json.loads(line) for line in block.decode().split("\n") if line]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    parts.replace_output(path)
