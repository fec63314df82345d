"""Files as a stream of records: one reader per format, each holding one record (or one parquet batch) in memory.

A record is a dict of the wanted columns, or a `BadRow` that says why there is none. What is wrong with a whole file
(empty, damaged, a column that is not there) is a ValueError that names it.
"""

import csv
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_ROW_BYTES = 64 * 2**20  # a longer line or field is a failed row: memory stays bounded on a file without newlines
_PEEK_ROWS = 100
_LONE_CR = "\udc0d"  # what surrogateescape never makes: it starts at U+DC80
_INNER_CR = re.compile(r"\r(?!\n|\Z)")


@dataclass(frozen=True, slots=True)
class BadRow:
    reason: str


Record = tuple[int, Mapping[str, object] | BadRow]  # (line or row number from 1, columns)


def kind_of(path: Path) -> str | None:
    """Format by file name, without .gz: "txt", "jsonl", "csv", "tsv", "parquet"; None for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = suffixes[-1].removeprefix(".") if suffixes else ""
    return kind if kind in _READERS else None


def records(
    path: Path, wanted: Mapping[str, str], columns: Sequence[str] | None = None, quoting: bool = True
) -> Iterator[Record]:
    """Stream the records of one file.

    Args:
        path: a file with a supported name.
        wanted: argument name -> column, e.g. {"text_column": "text"}; the text comes first.
        columns: names of the columns of a csv/tsv file without a header.
        quoting: False reads csv/tsv fields verbatim, quote characters included.

    Raises:
        ValueError: an empty or damaged file, or a column that it does not have.
    """
    kind = kind_of(path)
    assert kind is not None, f"{path} has no reader"
    with _opened(path) as file:
        yield from _READERS[kind](file, _Request(path, wanted, columns, quoting))


def check_file(
    path: Path, wanted: Mapping[str, str], columns: Sequence[str] | None = None, quoting: bool = True
) -> None:
    """Read the beginning of a file, so that what is wrong with all of it is said before any work is done."""
    stream = records(path, wanted, columns, quoting)
    if kind_of(path) != "jsonl":
        next(stream, None)
        return
    seen: set[str] = set()
    for _, (_, record) in zip(range(_PEEK_ROWS), stream, strict=False):
        if isinstance(record, dict):
            seen.update(record)
            if set(wanted.values()) <= seen:
                return


@dataclass(frozen=True, slots=True)
class _Request:
    path: Path
    wanted: Mapping[str, str]
    columns: Sequence[str] | None
    quoting: bool

    def check(self, names: Sequence[str]) -> None:
        for argument, column in self.wanted.items():
            if names.count(column) != 1:
                problem = "is not a column of" if column not in names else "is there more than once in"
                raise ValueError(f"{argument} {column!r} {problem} {self.path}, which has: {', '.join(names)}")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            start = file.peek(4)[:4]  # type: ignore[attr-defined]
            if not start:
                raise ValueError(f"{path} is empty")
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"{path} is UTF-16, convert it to UTF-8")
            yield file  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut or damaged: {error}") from None


def _lines(file: IO[bytes]) -> Iterator[tuple[int, str | BadRow]]:
    """Lines without their end, split at LF alone: text may hold U+2028, U+001D and their like."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(raw) == MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, BadRow(f"longer than {MAX_ROW_BYTES // 2**20} MiB")
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            yield number, BadRow("invalid UTF-8")


def _read_txt(file: IO[bytes], request: _Request) -> Iterator[Record]:
    argument_of_text, *others = request.wanted
    # a line is its own target, where that is asked for by the name of the text's column
    others = [name for name in others if request.wanted[name] != request.wanted[argument_of_text]]
    if others:
        raise ValueError(
            f"{others[0]} {request.wanted[others[0]]!r}: {request.path} is plain text and has no columns, "
            "use .jsonl, .csv, .tsv or .parquet"
        )
    for number, line in _lines(file):
        yield number, line if isinstance(line, BadRow) else {request.wanted[argument_of_text]: line}


def _read_jsonl(file: IO[bytes], request: _Request) -> Iterator[Record]:
    columns = request.wanted.values()
    missing = dict(request.wanted)
    names: dict[str, None] = {}
    for number, line in _lines(file):
        if isinstance(line, BadRow):
            yield number, line
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            yield number, BadRow("invalid JSON")
            continue
        if not isinstance(value, dict):
            yield number, BadRow("not a JSON object")
            continue
        if missing:
            names |= dict.fromkeys(value)
            missing = {argument: column for argument, column in missing.items() if column not in value}
            if missing and number >= _PEEK_ROWS:
                request.check(list(names))
        yield number, {column: value[column] for column in columns if column in value}
    if missing and names:
        request.check(list(names))


def _read_csv(file: IO[bytes], request: _Request) -> Iterator[Record]:
    kind = kind_of(request.path)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    lines: list[str] = []  # of the record being read
    reader = csv.reader(
        _kept(_csv_lines(file, request.path), lines),
        delimiter="\t" if kind == "tsv" else ",",
        quoting=csv.QUOTE_MINIMAL if request.quoting else csv.QUOTE_NONE,
        strict=True,
    )
    names = list(request.columns) if request.columns is not None else _header(reader, request)
    request.check(names)
    places = {column: names.index(column) for column in request.wanted.values()}
    while True:
        start = reader.line_num + 1
        lines.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, BadRow(f"bad csv ({error})")
            continue
        if not fields:  # a blank line
            continue
        if kind == "tsv" and rows_merged(lines, len(names)):
            raise ValueError(f"{request.path} line {start}: {MERGED}")
        if len(fields) != len(names):
            yield start, BadRow("wrong number of fields")
            continue
        row = {column: fields[place].replace(_LONE_CR, "\r") for column, place in places.items()}
        bad = any("\udc80" <= c <= "\udcff" for field in row.values() if not field.isascii() for c in field)
        yield start, BadRow("invalid UTF-8") if bad else row


MERGED = (
    "a quote mark joins it with the next lines, which are rows by themselves; if quote marks are text here, read "
    "it without quoting (quoting=False, --no-quoted, quoted: false)"
)


def rows_merged(lines: Sequence[str], width: int) -> bool:
    """Whether the lines of one quoted tsv record would each be a row of `width` fields if quote marks were text."""
    return width > 1 and len(lines) > 1 and all(line.count("\t") == width - 1 for line in lines)


def _kept(lines: Iterator[str], into: list[str]) -> Iterator[str]:
    for line in lines:
        into.append(line)
        yield line


def _csv_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    """Lines with their end, split at LF alone.

    Bytes that are no UTF-8 become lone surrogates, so that one of them costs its row and not the file. So does a CR
    that ends no line, which Python's own csv writer leaves unquoted and its reader would take for the end of the row.
    """
    number = 0
    while raw := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(raw) == MAX_ROW_BYTES and not raw.endswith(b"\n"):
            raise ValueError(f"{path}: line {number} is longer than {MAX_ROW_BYTES // 2**20} MiB")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        line = raw.decode("utf-8", errors="surrogateescape")
        yield _INNER_CR.sub(_LONE_CR, line) if "\r" in line else line


def _header(reader: Iterator[list[str]], request: _Request) -> list[str]:
    try:
        for fields in reader:
            if fields:
                return fields
    except csv.Error as error:
        raise ValueError(f"{request.path} has no readable header: {error}") from None
    raise ValueError(f"{request.path} is empty")


def _read_parquet(file: IO[bytes], request: _Request) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as spool:
        if isinstance(file, gzip.GzipFile):  # parquet is read from its end
            shutil.copyfileobj(file, spool)
            spool.seek(0)
        try:
            table = parquet.ParquetFile(spool if isinstance(file, gzip.GzipFile) else file)
            request.check(table.schema_arrow.names)
            columns = list(dict.fromkeys(request.wanted.values()))
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns, use_threads=False):
                values = [batch.column(column).to_pylist() for column in columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, dict(zip(columns, row, strict=True))
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{request.path} is not a readable parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[IO[bytes], _Request], Iterator[Record]]] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
}
SUPPORTED = ", ".join(f".{kind}" for kind in _READERS) + " (each also .gz)"
