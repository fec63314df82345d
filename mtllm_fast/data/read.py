"""Text rows from files and from the Hugging Face hub, as a stream whose memory does not grow with the corpus."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtllm_fast.data.formats import SUPPORTED, BadRow, check_file, kind_of, records
from mtllm_fast.data.language import ENGLISH_CODES

if TYPE_CHECKING:
    from datasets import IterableDataset

_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class TextRow:
    """One example.

    Fields:
        text: the text, or the first text of a pair.
        language: code of the MT tokenizer, e.g. `eng_Latn`; None where there is none, or nobody named it.
        text_pair: second text (a hypothesis), or None.
        label: class index, or the index of the right choice.
        id: the row's name in its source.
        choices: answers of a multiple-choice row.
        target: what a model is to write after reading the text, or None.
        finished: False of a target that was cut, after which no end is to be written.
        teacher_text: what a teacher reads in place of the text, such as the text that it is a translation of, or None;
            an encoder that fuses texts reads it beside the text. teacher_pair: likewise of text_pair.
        soft_label: the log-probability of each class, up to a constant, as a teacher that is not at hand gave it, or
            None.
    """

    text: str
    language: str | None = None
    text_pair: str | None = None
    label: int | None = None
    id: str | None = None
    choices: tuple[str, ...] | None = None
    target: str | None = None
    finished: bool = True
    teacher_text: str | None = None
    soft_label: tuple[float, ...] | None = None
    teacher_pair: str | None = None

    def for_teacher(self) -> TextRow:
        """The row as a teacher reads it.

        Raises:
            ValueError: teacher_text and teacher_pair do not take the places of all texts that the row has.
        """
        if self.teacher_text is None:
            return self
        if self.choices is not None or (self.text_pair is not None and self.teacher_pair is None):
            other = "choices" if self.choices is not None else "text_pair and no teacher_pair"
            raise ValueError(
                f"teacher_text={self.teacher_text[:40]!r}: takes the place of a text alone, but the row has {other}"
            )
        if self.text_pair is None and self.teacher_pair is not None:
            raise ValueError(f"teacher_pair={self.teacher_pair[:40]!r}: the row has no text_pair, whose place it takes")
        return replace(self, text=self.teacher_text, text_pair=self.teacher_pair, teacher_text=None, teacher_pair=None)


class MappedRows:
    """Rows, each as `change` makes it when it is read; re-iterable where they are."""

    def __init__(self, rows: Iterable[TextRow]) -> None:
        self.rows = rows

    def change(self, row: TextRow) -> TextRow:
        raise NotImplementedError

    def __iter__(self) -> Iterator[TextRow]:
        return map(self.change, self.rows)

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]  # TypeError for a stream, as of any

    @property
    def counts(self) -> Any:
        """The reader's own counts, where it has them."""
        return getattr(self.rows, "counts", None)


@dataclass(frozen=True, slots=True)
class UnusableRow:
    """What stands in a source in the place of a row, and why it is none.

    Fields:
        place: `file:line`. id: its name, where that can be read.
    """

    place: str
    reason: str
    id: str | None = None
    language: str | None = None


@dataclass
class RowCounts:
    """What one pass over a source has met so far.

    Fields:
        rows: rows given out.
        empty: rows without text, skipped.
        failed: rows that could not be read, skipped.
        reasons: how many rows failed for which reason.
        first: where each reason was met first, `file:line`.
    """

    rows: int = 0
    empty: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def fail(self, reason: str, place: str) -> None:
        self.failed += 1
        self.reasons[reason] += 1
        self.first.setdefault(reason, place)


def read_rows(
    source: str | Path,
    *,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    language_column: str | None = None,
    language: str | None = None,
    id_column: str | None = None,
    target_column: str | None = None,
    teacher_text_column: str | None = None,
    teacher_pair_column: str | None = None,
    finished_column: str | None = None,
    soft_label_column: str | None = None,
    split: str = "train",
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    quoting: bool = True,
) -> RowStream:
    """Open a corpus.

    Args:
        source: a .txt (one text per line), .jsonl, .csv, .tsv or .parquet file, each also .gz; a folder (every such
            file in it and below, by name, hidden ones left out); a glob; or a hub dataset "org/name" or
            "org/name:config".
        text_column, pair_column, label_column, language_column, id_column, target_column, teacher_text_column,
            teacher_pair_column, finished_column (true or false: whether the target has its end), soft_label_column (a
            list of the log-probability of each label): columns to read; text_column is ignored for .txt.
        labels: class names in the order of their indices. Without them labels must be integers (for hub datasets, the
            names of the dataset's own ClassLabel are used).
        language: code of every row, where there is no language_column; encoders with languages need one of the two.
        split: split of a hub dataset; files have none.
        limit: stop after so many rows.
        columns: column names of csv/tsv files without a header.
        quoting: False reads csv/tsv fields verbatim, as files that were written without csv quoting need.

    Returns:
        RowStream: iterate it as often as needed; `.counts` says what the latest pass met.

    Raises:
        FileNotFoundError: nothing at `source`.
        ValueError, TypeError: an unsupported or empty file, or an argument that does not fit the data. While iterating:
            a label outside `labels`, no list of log-probabilities, one each, a damaged file, or a source without one
            usable row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    if isinstance(labels, str):
        raise TypeError(f"labels must be a sequence of names, got the string {labels!r}")
    if labels is not None and (not labels or len(set(labels)) != len(labels)):
        raise ValueError(f"labels must be distinct names, got {list(labels)!r}")
    if labels is not None and label_column is None and soft_label_column is None:
        raise ValueError("labels are given but no label_column: name the column that holds them")
    if soft_label_column is not None and labels is None:
        raise ValueError(f"soft_label_column={soft_label_column!r}: holds a number per label; name the labels")
    if teacher_text_column is not None and pair_column is not None and teacher_pair_column is None:
        raise ValueError(
            f"teacher_text_column={teacher_text_column!r}: takes the place of a text alone, but pair_column="
            f"{pair_column!r} makes pairs; leave one of them out, or name a teacher_pair_column, too"
        )
    if teacher_pair_column is not None and (teacher_text_column is None or pair_column is None):
        missing = "teacher_text_column" if teacher_text_column is None else "pair_column"
        raise ValueError(f"teacher_pair_column={teacher_pair_column!r}: {missing} is missing, which it goes with")
    wanted = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    wanted |= {"language_column": language_column, "id_column": id_column, "target_column": target_column}
    wanted |= {"teacher_text_column": teacher_text_column, "finished_column": finished_column}
    wanted |= {"soft_label_column": soft_label_column, "teacher_pair_column": teacher_pair_column}
    stream = RowStream(
        source=str(source),
        wanted={argument: column for argument, column in wanted.items() if column is not None},
        labels=tuple(labels) if labels is not None else None,
        language=language,
        split=split,
        limit=limit,
        columns=tuple(columns) if columns is not None else None,
        quoting=quoting,
    )
    stream.check()
    return stream


@dataclass
class RowStream:
    """A re-iterable stream of TextRow; made by `read_rows`, picklable, so that workers can read it too.

    `unusable(row)` gives the reason why a row cannot be used, or None.
    """

    source: str
    wanted: dict[str, str]  # argument of read_rows -> column
    labels: tuple[str, ...] | None
    language: str | None
    split: str
    limit: int | None
    columns: tuple[str, ...] | None
    quoting: bool
    counts: RowCounts = field(default_factory=RowCounts)
    unusable: Callable[[TextRow], str | None] | None = None

    def identity(self) -> dict[str, object]:
        """Plain data that tells whether another stream gives the same rows: where and how it reads, files as of now."""
        local = _hub_name(self.source) is None
        language = self.language or ENGLISH_CODES[0]  # as it was written when there was no row without one
        return {
            "source": self.source,
            "reading": [self.wanted, language, self.split, self.limit, list(self.columns or ()), self.quoting],
            "files": [
                [str(path), path.stat().st_size, path.stat().st_mtime_ns]
                for path in (resolve(self.source) if local else ())
            ],
        }

    def check(self) -> None:
        """Raise what can be known without reading everything."""
        hub = _hub_name(self.source)
        if hub is not None:
            self._open_hub(*hub)
            return
        for path in resolve(self.source)[:1]:
            check_file(path, self.wanted, self.columns, self.quoting)

    def __iter__(self) -> Iterator[TextRow]:
        return (row for row in self.everything() if isinstance(row, TextRow))

    def everything(self) -> Iterator[TextRow | UnusableRow]:
        """The rows, and in their places those that are none."""
        counts = self.counts = RowCounts()
        for place, record, labels in self._records():
            row = record if isinstance(record, BadRow) else self._row(record, labels, place)
            if isinstance(row, TextRow) and self.unusable is not None and (reason := self.unusable(row)):
                row = BadRow(reason)
            if not isinstance(row, TextRow):
                if row is None:
                    counts.empty += 1
                else:
                    counts.fail(row.reason, place)
                yield UnusableRow(place, "empty" if row is None else row.reason, self._id(record))
                continue
            counts.rows += 1
            yield row
            if counts.rows == self.limit:
                return
        if counts.rows == 0:
            why = "".join(
                f"; {n} failed: {reason} (first at {counts.first[reason]})"
                for reason, n in counts.reasons.most_common(3)
            )
            raise ValueError(f"source {self.source!r} holds no usable row: {counts.empty} empty{why}")

    def _records(self) -> Iterator[tuple[str, Mapping[str, object] | BadRow, tuple[str, ...] | None]]:
        hub = _hub_name(self.source)
        if hub is not None:
            dataset, labels = self._open_hub(*hub)
            for number, record in enumerate(dataset, 1):
                yield f"{self.source}:{number}", record, labels
            return
        for path in resolve(self.source):
            name = str(path)
            for number, local in records(path, self.wanted, self.columns, self.quoting):
                yield f"{name}:{number}", local, self.labels

    def _row(self, record: Mapping[str, object], labels: tuple[str, ...] | None, place: str) -> TextRow | BadRow | None:
        """The row of a record, or why there is none: None where it has no text."""
        texts: dict[str, str | None] = {"pair_column": None, "language_column": self.language}
        texts |= {"target_column": None, "teacher_text_column": None, "teacher_pair_column": None}
        for argument in ("text_column", *texts):
            if argument not in self.wanted:
                continue
            column = self.wanted[argument]
            value = record.get(column)
            if value is None and column not in record:
                return BadRow(f"no {column!r}")
            if value is None or (isinstance(value, str) and not value.strip()):
                return None
            if not isinstance(value, str):
                return BadRow(f"{column!r} is {type(value).__name__}, not text")
            if not value.isascii() and _SURROGATE.search(value):
                return BadRow("invalid Unicode (lone surrogate)")
            texts[argument] = value
        finished = True
        if "finished_column" in self.wanted:
            finished = record.get(self.wanted["finished_column"])  # type: ignore[assignment]
            if not isinstance(finished, bool):
                return BadRow(f"{self.wanted['finished_column']!r} is {finished!r}, neither true nor false")
        label = None
        if "label_column" in self.wanted:
            value = record.get(self.wanted["label_column"])
            if value is None or value == "" or (value == -1 and not isinstance(value, bool)):
                return BadRow("no label")  # -1 is how hub datasets write it
            label = self._label(value, labels, place)
        soft_label = self._soft_label(record, labels, place) if "soft_label_column" in self.wanted else None
        return TextRow(
            text=str(texts["text_column"]),
            language=texts["language_column"],
            text_pair=texts["pair_column"],
            label=label,
            id=self._id(record),
            target=texts["target_column"],
            teacher_text=texts["teacher_text_column"],
            teacher_pair=texts["teacher_pair_column"],
            finished=finished,
            soft_label=soft_label,
        )

    def _id(self, record: Mapping[str, object] | BadRow) -> str | None:
        name = record.get(self.wanted["id_column"]) if isinstance(record, dict) and "id_column" in self.wanted else None
        return None if name is None else str(name)

    def _label(self, value: Any, labels: tuple[str, ...] | None, place: str) -> int:
        numbered = labels is not None and all(name.removeprefix("-").isdecimal() for name in labels)
        if labels is not None and (isinstance(value, str) or numbered):
            # where the names are numbers, a number is a name and no index
            name = value if isinstance(value, str) else str(_whole(value))
            if name in labels:
                return labels.index(name)
        elif not isinstance(value, bool):
            try:
                index = int(value)
            except (TypeError, ValueError):
                index = -1
            if index >= 0 and (isinstance(value, str) or index == value) and (labels is None or index < len(labels)):
                return index
        column = self.wanted["label_column"]
        right = f"one of {', '.join(labels)}" if labels is not None else "an integer >= 0; name the classes with labels"
        raise ValueError(f"label_column {column!r}: {value!r} at {place} is no label, it must be {right}")

    def _soft_label(self, record: Mapping[str, object], labels: Sequence[str] | None, place: str) -> tuple[float, ...]:
        column = self.wanted["soft_label_column"]
        value: Any = record.get(column)
        try:
            found = tuple(map(float, value)) if not isinstance(value, str | bytes | Mapping) else ()
        except (TypeError, ValueError):
            found = ()
        if len(found) != len(labels or found) or not found or not all(-math.inf < one <= 0 for one in found):
            raise ValueError(
                f"soft_label_column {column!r}: {value!r} at {place} is no list of {len(labels or ()) or 'finite'} "
                "log-probabilities, one for each label, none above 0"
            )
        return found

    def _open_hub(self, name: str, config: str | None) -> tuple[IterableDataset, tuple[str, ...] | None]:
        import datasets

        try:
            # no trust_remote_code: a dataset that needs its own code is refused
            dataset = datasets.load_dataset(name, config, split=self.split, streaming=True)
        except Exception as error:  # the hub client raises many kinds; whichever, the user needs one line
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"source {self.source!r}: no such file or folder here, and as a hub dataset (split {self.split!r}) it "
                f"cannot be opened: {reason}"
            ) from None
        names = dataset.column_names
        for argument, column in self.wanted.items():
            if names is not None and column not in names:
                raise ValueError(
                    f"{argument} {column!r} is not a column of {self.source}, which has: {', '.join(names)}"
                )
        labels = self.labels
        if labels is None and "label_column" in self.wanted and dataset.features is not None:
            own = getattr(dataset.features.get(self.wanted["label_column"]), "names", None)
            labels = tuple(own) if own else None
        return dataset, labels


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_SURROGATE = re.compile("[\ud800-\udfff]")


def resolve(source: str) -> list[Path]:
    """The files that a local source stands for, sorted by name.

    Raises:
        FileNotFoundError: no file, folder or match.
        ValueError: a file that is not in a supported format, or a folder without one that is.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [
            p
            for p in sorted(path.rglob("*"))
            if p.is_file() and kind_of(p) and not any(part.startswith(".") for part in p.relative_to(path).parts)
        ]
        if not found:
            raise ValueError(f"source {source!r} is a folder without a supported file: {SUPPORTED}")
        return found
    if path.is_file():
        found = [path]
    elif glob.has_magic(source):
        found = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not found:
            raise FileNotFoundError(f"source {source!r} matches no file")
    else:
        raise FileNotFoundError(
            f"source {source!r}: no such file or folder (a hub dataset is written org/name or org/name:config)"
        )
    for file in found:
        if kind_of(file) is None:
            raise ValueError(f"source {str(file)!r} is not in a supported format: {SUPPORTED}")
    return found


def _hub_name(source: str) -> tuple[str, str | None] | None:
    """(name, config) where `source` can only mean a hub dataset: local paths and their misspellings stay local."""
    match = _HUB_NAME.fullmatch(source)
    if match is None or Path(source).exists() or kind_of(Path(source)) or Path(Path(source).parts[0]).is_dir():
        return None
    return match["name"], match["config"]
