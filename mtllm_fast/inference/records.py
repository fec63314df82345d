"""Records made of rows, in a .jsonl or .parquet file: resumable after any kill, shared by any number of processes.

What `mtllm translate` and `mtllm respond` have in common. A window of rows is made into records at once, and is safe in
`<output>.part` when it is done; the last process joins the windows.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ..jobs.durable import write_text
from ..jobs.parts import Parts
from .progress import progress_bar
from .stream import Interrupted, begin_anew
from .writers import join_blocks

FORMATS = (".parquet", ".jsonl")
Row = TypeVar("Row")
Kind = Literal["string", "int64", "float64", "bool", "float64s"]


class Made(NamedTuple):
    """Records of a window of rows; truncated: rows whose text was cut."""

    records: Sequence[Mapping[str, object]]
    truncated: int


@dataclass(frozen=True)
class RecordFile:
    """A file of records and what made it.

    Fields:
        path: .parquet or .jsonl.
        command: who writes it, for messages and the metadata of a .parquet file.
        columns: name -> kind of what the records hold.
        settings: plain data that the records depend on. A stopped run goes on only with the same.
        more: likewise, but not stored in the finished file.
        source: the argument that names the rows.
        counted: what `RecordReport.counts` counts, by name: whether a record is one. Where it is given, settings and
            counts are also written to `<path>.run.json`.
    """

    path: Path
    command: str
    columns: Mapping[str, Kind]
    settings: Mapping[str, object]
    more: Mapping[str, object] = field(default_factory=dict)
    source: str = "input"
    counted: Mapping[str, Callable[[Mapping[str, Any]], bool]] | None = None

    @property
    def sidecar(self) -> Path:
        return self.path.with_name(f"{self.path.name}.run.json")

    def line(self, record: Mapping[str, object]) -> str:
        return json.dumps({name: record[name] for name in self.columns}, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class RecordReport:
    """What came of `write_records`.

    Fields:
        rows: in the output (or, where it is not complete, stored); resumed: those of an earlier run.
        truncated: rows whose text was cut.
        counts: of `RecordFile.counted`, over the whole output.
        complete: the output is written. False for a process whose share is done before that of others.
    """

    rows: int
    resumed: int
    truncated: int
    counts: Mapping[str, int] = field(default_factory=dict)
    complete: bool = True


def write_records(
    file: RecordFile,
    rows: Iterable[Row],
    make: Callable[[int, list[Row]], Made],
    *,
    window: int,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    total: int | None = None,
    progress: bool = False,
) -> RecordReport:
    """Write the records of `rows`, in order.

    A run that was stopped, even by kill -9, goes on where it was when the same call is made again, and gives the same
    file as one that was not (on the same kind of machine with as many threads). Every process makes every
    world_size-th window; the last one joins them.

    Args:
        rows: the same at every call.
        make: records of consecutive rows, the number of the first of which, from 0, is given.
        window: rows that are made into records, and saved, together.
        total: number of rows, for the bar.

    Raises:
        ValueError: the output exists, a stopped run had other settings, another process writes to it, no rows, or the
            disk is full.
        Interrupted: Ctrl-C.
    """
    if file.path.suffix not in FORMATS:
        raise ValueError(f"output={str(file.path)!r}: expected a name ending in {' or '.join(FORMATS)}")
    if window < 1 or not 0 <= rank < world_size:
        raise ValueError(f"window={window}, rank={rank}, world_size={world_size}: expected window >= 1, a rank below")
    if overwrite:
        begin_anew(file.path, rank, world_size)
    parts = Parts(file.path, {**file.settings, **file.more}, rank=rank, replace=overwrite)
    resumed = parts.rows()
    try:
        if not parts.complete():
            with progress_bar(file.command, total, progress, resumed) as advance:
                _make(parts, file, rows, make, window, (rank, world_size), advance)
        if not (parts.lock_for_joining() and parts.complete()):
            return RecordReport(parts.rows(), resumed, parts.truncated(), complete=False)
        report = RecordReport(parts.rows(), resumed, parts.truncated())
        if not report.rows:
            raise ValueError(f"{file.source}: holds no text to {file.command}")
        counts = _joined(parts, file, report)
        parts.remove()
        return RecordReport(report.rows, resumed, report.truncated, counts)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {parts.rows():,} texts are saved in {parts.folder}, the same command goes on from there"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise ValueError(
            f"output={str(file.path)!r}: cannot be written ({error.strerror}); {parts.rows():,} texts are saved in "
            f"{parts.folder}, the same command goes on from there"
        ) from error
    finally:
        if not parts.rows() and world_size == 1:
            parts.remove()
        parts.close()


def _make(
    parts: Parts,
    file: RecordFile,
    rows: Iterable[Row],
    make: Callable[[int, list[Row]], Made],
    window: int,
    share: tuple[int, int],
    advance: Callable[[int], None],
) -> None:
    """Make the windows that are missing; share: rank and number of processes."""
    stream, index, first = iter(rows), 0, 0
    rank, world_size = share
    while chunk := list(islice(stream, window)):
        if index % world_size == rank and index not in parts.done:
            made = make(first, chunk)
            parts.append(index, len(chunk), made.truncated, ["".join(map(file.line, made.records)).encode()])
            advance(len(chunk))
        index, first = index + 1, first + len(chunk)
    parts.finish(index, first)


def _joined(parts: Parts, file: RecordFile, report: RecordReport) -> Mapping[str, int]:
    """Put the output in its place, and what made it beside it; the counts."""
    if parts.joined:  # by a process that was killed before the folder was gone
        written = json.loads(file.sidecar.read_text(encoding="utf-8")) if file.counted is not None else {}
        return {name: int(written[name]) for name in file.counted or ()}
    found: dict[str, int] = {}
    if file.counted is not None:
        counts: Counter[str] = Counter()
        for block in parts.blocks(parts.records()):
            for record in _records(block):
                counts.update(name for name, holds in file.counted.items() if holds(record))
        found = {name: counts[name] for name in file.counted}
        about = {"command": file.command, **file.settings, **file.more, "rows": report.rows}
        content = json.dumps({**about, "truncated": report.truncated, **found}, indent=2, ensure_ascii=False)
        write_text(file.sidecar, content + "\n")
    if file.path.suffix == ".parquet":
        _join_parquet(parts, file)
    else:
        join_blocks(parts)
    return found


def _records(block: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in block.decode().split("\n") if line]


def _join_parquet(parts: Parts, file: RecordFile) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {name: getattr(pa, name)() for name in ("string", "int64", "float64")}
    kinds |= {"bool": pa.bool_(), "float64s": pa.list_(pa.float64())}
    schema = pa.schema(
        [(name, kinds[kind]) for name, kind in file.columns.items()],
        metadata={f"mtllm_{file.command}": json.dumps(file.settings, sort_keys=True)},
    )
    path = parts.folder / "output"
    with parquet.ParquetWriter(path, schema) as writer:
        for block in parts.blocks(parts.records()):
            writer.write_table(pa.Table.from_pylist(_records(block), schema=schema))
    parts.replace_output(path)
