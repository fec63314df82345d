"""Encode a corpus into a file: constant memory, resumable after any kill, shared by any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch.distributed

from ..data.language import reads_language
from ..data.read import RowStream, TextRow, UnusableRow
from ..data.text_tokens import BadText
from ..data.tokenise import StackTokenizer
from ..jobs.parts import Parts, clear
from ..models.fingerprint import fingerprint
from .engine import Engine, Pooling
from .progress import progress_bar
from .writers import embedding_file, npy_header

_MOST_CODES = 50  # unknown language codes that are told apart: a column that holds no codes has any number of values
_SKIPPED, _INDEX = "skipped.tsv", "index.npy"
OnBadRow = Literal["nan", "skip", "fail"]


@dataclass(frozen=True)
class StreamReport:
    """What came of `encode_file`.

    Fields:
        rows, truncated: rows of the output, and how many of them were cut to the tokenizer's limit.
        resumed: rows that were there before this run.
        skipped: unusable rows by reason; `skipped_file` names each of them.
        index_file: where rows may be left out: the number in the source, from 0, of each row of the output.
        complete: the output is written. False for a rank whose share is done before that of others.
    """

    rows: int
    truncated: int
    resumed: int
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_file: Path | None = None
    index_file: Path | None = None
    complete: bool = True


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says what is saved and how to go on."""


def encode_file(
    engine: Engine,
    rows: RowStream,
    output: str | Path,
    *,
    pooling: Pooling = "mean",
    normalize: bool = False,
    on_bad_row: OnBadRow = "nan",
    settings: Mapping[str, object] | None = None,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> StreamReport:
    """Write the embeddings of `rows` to `output`, in order.

    A run that was stopped, even by kill -9, goes on where it was when the same call is made again, and gives the same
    bytes as one that was not (on the same kind of machine with as many threads). Every rank reads all rows, encodes
    every world_size-th window and stores it in `<output>.part`; the rank that finishes last joins the windows.

    Args:
        rows: from `read_rows`.
        output: .npy or .safetensors with (N, D) float32, or .parquet with id, language and embedding.
        on_bad_row: what becomes of a row that is empty, cannot be read, or is in a language that the model has no code
            for: "nan" puts NaN in its place, so that row i of the output is row i of the source; "skip" leaves it out
            and writes `<output>.index.npy`; "fail" ends the run there. `<output>.skipped.tsv` lists such rows.
        settings: more that the embeddings depend on; compared, like the options here, before a stopped run goes on.
        overwrite: begin anew even where there is a stopped run or the output.
        progress: show a bar on stderr.

    Raises:
        ValueError: a bad row (with "fail"), the output exists, a stopped run had other settings, another process writes
            to the same output, or there is no usable row.
        Interrupted: Ctrl-C.
    """
    output = Path(output)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must be in [0, world_size={world_size})")
    settings = {
        "format": 1,
        "pooling": pooling,
        "normalize": normalize,
        "on_bad_row": "skip" if on_bad_row == "skip" else "nan",  # up to where it ends, "fail" writes the same
        "window": engine.window,
        "max_tokens": engine.max_tokens,
        "device": engine.device.type,
        "model": fingerprint(engine.model),
        **rows.identity(),
        **(settings or {}),
    }
    metadata = {name: str(settings[name]) for name in ("model", "pooling", "normalize", "source")}
    file = embedding_file(output, engine.model.hidden_size, metadata)
    if overwrite:
        begin_anew(output, rank, world_size)
    parts = Parts(output, settings, reserve=file.reserve, rank=rank, replace=overwrite)
    resumed = parts.rows()
    try:
        if not parts.complete():
            windows = engine.encode_windows(
                _read(rows, engine, parts, on_bad_row),
                pooling=pooling,
                normalize=normalize,
                on_bad_text="nan" if on_bad_row == "nan" else "fail",
                skip=lambda index: index % world_size != rank or index in parts.done,
            )
            with progress_bar("encode", None, progress, resumed) as advance:
                for window in windows:
                    payload = file.payload(window, window.index * engine.window)
                    parts.append(window.index, len(window.ids), window.truncated, payload)
                    advance(len(window.ids))
        if not (parts.lock_for_joining() and parts.complete()):
            return StreamReport(parts.rows(), parts.truncated(), resumed, complete=False)
        named = _publish(parts, _SKIPPED, bool(parts.end()["skipped"]))
        index = _publish(parts, _INDEX, on_bad_row == "skip")
        if not parts.joined:
            file.join(parts)
        end, truncated = parts.end(), parts.truncated()
        parts.remove()
        return StreamReport(end["rows"], truncated, resumed, end["skipped"], named, index)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {parts.rows():,} rows are saved in {parts.folder}, the same command goes on from there"
        ) from None
    finally:
        if world_size == 1 and not (parts.joined or file.holds_any(parts)):
            parts.remove()
        parts.close()


def begin_anew(output: Path, rank: int, world_size: int) -> None:
    """Clear a stopped run before any rank begins."""
    if world_size == 1:
        clear(output)
        return
    if "MASTER_ADDR" not in os.environ:
        raise ValueError("overwrite with several processes needs torchrun (it sets MASTER_ADDR and MASTER_PORT)")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    if rank == 0:
        clear(output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _read(rows: RowStream, engine: Engine, parts: Parts, on_bad_row: OnBadRow) -> Iterator[TextRow | UnusableRow]:
    """The rows of the output. Unusable ones are listed, and at the end it is recorded how many there were."""
    tokenizer = engine.model.require_tokenizer()
    check = language_check(tokenizer) if reads_language(tokenizer, engine.model.side) else None
    stream = replace(rows, unusable=check)
    listed, index = (parts.folder / f"{parts.rank}.{name}" for name in (_SKIPPED, _INDEX))
    given = 0
    with listed.open("w", encoding="utf-8") as file, index.open("wb") as numbers:
        numbers.write(npy_header("<i8", 0))
        for number, row in enumerate(stream.everything()):
            if isinstance(row, UnusableRow):
                if on_bad_row == "fail":
                    raise ValueError(f"{row.place}: {row.reason}; --on-bad-row nan or skip goes on without such rows")
                print(row.place, row.reason, sep="\t", file=file)
                if on_bad_row == "skip":
                    continue
            numbers.write(number.to_bytes(8, "little"))
            given += 1
            yield row
        numbers.seek(0)
        numbers.write(npy_header("<i8", given))
    counts = stream.counts
    for path, name in ((listed, _SKIPPED), (index, _INDEX)):
        os.replace(path, parts.folder / name)
    skipped = {"empty": counts.empty} if counts.empty else {}
    parts.finish(-(-given // engine.window), given, skipped=skipped | dict(counts.reasons))


def _publish(parts: Parts, name: str, wanted: bool) -> Path | None:
    """Put a file of the part folder beside the output; where it is not wanted, none of an earlier run may lie there."""
    path = parts.output.with_name(f"{parts.output.name}.{name}")
    if not wanted:
        path.unlink(missing_ok=True)
        return None
    held = parts.folder / name
    if held.exists():
        os.replace(held, path)
    return path


def text_check(
    tokenizer: StackTokenizer, side: str, language: Callable[[TextRow], str | None] | None = None
) -> Callable[[TextRow], str | None]:
    """A function that says of a row why it cannot be read on `side`, or None; `language` is asked first."""

    def unusable(row: TextRow) -> str | None:
        if language is not None and (reason := language(row)) is not None:
            return reason
        try:
            tokenizer.side(side, [row], ends=False)
        except BadText:
            return "cannot be tokenised"
        return None

    return unusable


def language_check(tokenizer: StackTokenizer) -> Callable[[TextRow], str | None]:
    """A function that says of a row why it cannot be read in its language, or None."""
    verdicts: dict[str, str | None] = {}

    def unusable(row: TextRow) -> str | None:
        code = row.language
        if code is None:
            return None
        if code not in verdicts:
            if len(verdicts) > len(tokenizer.languages) + _MOST_CODES:
                return "unknown language"
            try:
                tokenizer.language_id(code)
                verdicts[code] = None
            except ValueError:
                verdicts[code] = f"unknown language {code!r}"
        return verdicts[code]

    return unusable
