"""Strict readers of published evaluation files.

The corpus reader (`data.read`) skips a row that fails and goes on. An evaluation set must keep every row, in order, or
stop: a missing row would shift row-aligned labels and change a published score. So these readers raise on anything
malformed, and they know the two things benchmark files do that corpora do not: no header, and no quoting.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data.formats import MAX_ROW_BYTES, MERGED, rows_merged

Record = dict[str, Any]  # column -> value
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
ENDINGS = (*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES if suffix != ".parquet"))


def kind(path: Path) -> str:
    """The container of a file: "tsv", "csv", "jsonl", "json" or "parquet" (".gz" is seen through)."""
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"data file {str(path)!r}: unknown ending, expected one of {', '.join(ENDINGS)}")
    return suffix[1:]


def read_text(path: Path) -> str:
    """The whole file as text: UTF-8, a byte-order mark at the start dropped, line ends as they are."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data file {str(path)!r}: not UTF-8 at byte {error.start}") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"data file {str(path)!r}: damaged gzip file: {error}") from None


def records(path: Path, *, header: tuple[str, ...] | None = None, quoted: bool = True) -> Iterator[Record]:
    """The records of one file, in order.

    Args:
        path: a file with one of `ENDINGS`.
        header: names of the columns of a table without a header line (a row may have fewer, from the left); None: the
            first line is the header.
        quoted: csv quoting with doubled quotes; False: quote marks are text and a line is a row.

    Raises:
        ValueError: names the file and the line (or record) that is malformed.
    """
    container = kind(path)
    if container == "parquet":
        yield from _parquet(path)
    elif container == "json":
        yield from _json(path)
    elif container == "jsonl":
        yield from _jsonl(path)
    else:
        yield from _table(path, "," if container == "csv" else "\t", header, quoted)


def columns(path: Path, *, header: tuple[str, ...] | None = None, quoted: bool = True) -> tuple[str, ...]:
    """Column names of a file: of its header line, of `header` as far as its first row goes, or of its first object.

    Raises:
        ValueError: the file is empty, or malformed at its start.
    """
    container = kind(path)
    if container in ("tsv", "csv"):
        delimiter = "," if container == "csv" else "\t"
        lines = _quoted_lines(path, delimiter) if quoted else _raw_lines(path, delimiter)
        for _, fields in lines:
            return tuple(fields) if header is None else header[: len(fields)]
    else:
        for record in records(path):
            return tuple(record)
    raise ValueError(f"data file {str(path)!r}: holds no rows")


def _table(path: Path, delimiter: str, header: tuple[str, ...] | None, quoted: bool) -> Iterator[dict[str, str]]:
    lines = _quoted_lines(path, delimiter) if quoted else _raw_lines(path, delimiter)
    names = header
    fewest = 1
    for number, fields in lines:
        if names is None:
            names = tuple(fields)
            fewest = len(names)
            if len(set(names)) != len(names):
                raise ValueError(f"data file {str(path)!r}: a column name occurs twice in {', '.join(names)}")
            continue
        if header is not None and fewest == 1:
            fewest = len(fields)  # the first row of a table without header fixes its width
        if len(fields) != fewest or len(fields) > len(names):
            raise ValueError(
                f"data file {str(path)!r} line {number}: {len(fields)} fields, expected {min(fewest, len(names))}"
            )
        yield dict(zip(names, fields, strict=False))


def _quoted_lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = text.split("\n") if delimiter == "\t" and '"' in text else []
    width, before = 0, 0
    try:
        for fields in reader:
            if fields:  # the csv module gives [] for an empty line
                width = width or len(fields)
                if lines and rows_merged(lines[before : reader.line_num], width):
                    raise ValueError(f"data file {str(path)!r} line {before + 1}: {MERGED}")
                yield reader.line_num, fields
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"data file {str(path)!r} line {reader.line_num}: {error}") from None


def _raw_lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # split on LF only: str.splitlines() would also cut at U+001D, U+0085, U+2028, which XNLI has inside texts
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield number, line.removesuffix("\r").split(delimiter)


def _json(path: Path) -> Iterator[Record]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"data file {str(path)!r} line {error.lineno}: not JSON: {error.msg}") from None
    items = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"data file {str(path)!r}: expected a list of objects, or an object of objects")
    yield from items


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data file {str(path)!r} line {number}: not JSON: {error.msg}") from None
        if not isinstance(item, dict):
            raise ValueError(f"data file {str(path)!r} line {number}: expected an object, got {type(item).__name__}")
        yield item


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        table = pq.read_table(path)
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"data file {str(path)!r}: not a readable parquet file: {reason}") from None
    yield from table.to_pylist()
