"""Windows of an output in the making, on disk: safe against a kill at any moment, written by any number of processes.

A folder `<output>.part` beside the output:

    run.json        the settings of the run; only a run with the same ones may go on
    K.data          bytes of the windows that process K made, after `reserve` bytes for a file header
    K.log           one RECORD per window, written when the window's bytes are on the disk
    end.json        once a process has read its input to the end: how many windows and rows there are

What counts as done is what the logs say. Whoever starts next takes the windows that are missing, and whoever finds that
none is missing joins them.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable import is_at, lock, opened, sync, write_text
from .ledger import differing

RECORD = np.dtype(
    [
        ("window", "<u8"),
        ("start", "<u8"),  # byte range in K.data
        ("end", "<u8"),
        ("rows", "<u4"),
        ("truncated", "<u4"),
        ("part", "<u4"),  # K
        ("check", "<u4"),  # CRC-32 of what stands before
    ]
)


class Parts:
    """The part folder of `output`, as process `rank` sees it.

    Args:
        settings: plain data; everything that the bytes of the output depend on.
        reserve: bytes left free at the start of a data file.
        replace: an output that is there may be replaced, even where no run was stopped.

    Raises:
        ValueError: the output exists, a stopped run had other settings, or another process is writing here.
    """

    def __init__(
        self, output: Path, settings: Mapping[str, object], *, reserve: int = 0, rank: int = 0, replace: bool = False
    ) -> None:
        self.output, self.rank, self.reserve = output, rank, reserve
        self.folder = output.with_name(output.name + ".part")
        shutil.rmtree(self._gone, ignore_errors=True)
        if output.exists() and not (replace or self.folder.exists()):
            raise ValueError(f"--output {output}: exists; pass --overwrite to replace it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._agree(settings)
        self.joined = self._is_joined()
        self._handles: list[int] = []
        self._log = self._opened(f"{rank}.log")
        if not lock(self._log, wait=False):
            self.close()
            raise ValueError(f"--output {output}: another process (rank {rank}) is writing it")
        if not self.joined:
            self._data = self._opened(f"{rank}.data")
            self._trim()
        self.done = {int(window) for window in self.records()["window"]}

    def _opened(self, name: str) -> int:
        self._handles.append(opened(self.folder / name))
        return self._handles[-1]

    def _agree(self, settings: Mapping[str, object]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        before = json.loads(path.read_text(encoding="utf-8"))
        if names := sorted(differing(before, settings)):
            others = "; ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in names)
            raise ValueError(
                f"--output {self.output}: a stopped run in {self.folder.name} had other settings ({others}); "
                "use those, or pass --overwrite to begin anew"
            )

    def _trim(self) -> None:
        """Drop what a kill left behind the last complete record."""
        mine = _read_log(self.folder, self.rank)
        os.ftruncate(self._log, len(mine) * RECORD.itemsize)
        os.ftruncate(self._data, int(mine["end"][-1]) if len(mine) else self.reserve)
        os.lseek(self._log, 0, os.SEEK_END)
        self._position = os.lseek(self._data, 0, os.SEEK_END)

    def records(self) -> NDArray[np.void]:
        """One RECORD per complete window of any process, by window."""
        ranks = sorted(int(path.stem) for path in self.folder.glob("*.log"))
        logs = (_read_log(self.folder, rank, check_data=not self.joined) for rank in ranks)
        found = np.concatenate([np.empty(0, RECORD), *logs])
        return found[np.unique(found["window"], return_index=True)[1]]

    def append(self, window: int, rows: int, truncated: int, data: Sequence[bytes]) -> None:
        """Store a window; when this returns, no crash can lose it."""
        size = 0
        for block in data:
            size += _write(self._data, block)
        os.fsync(self._data)
        record = np.zeros(1, RECORD)
        record[0] = (window, self._position, self._position + size, rows, truncated, self.rank, 0)
        record["check"] = _check(record)[0]
        _write(self._log, record.tobytes())
        os.fsync(self._log)
        self._position += size
        self.done.add(window)

    def finish(self, windows: int, rows: int, **more: object) -> None:
        """Record that the input has no further windows."""
        write_text(self.folder / "end.json", json.dumps({"windows": windows, "rows": rows, **more}))

    def end(self) -> dict[str, Any]:
        """What `finish` recorded; empty before."""
        path = self.folder / "end.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def complete(self) -> bool:
        """Whether every window is there."""
        return len(self.records()) == self.end().get("windows")

    def _is_joined(self) -> bool:
        """Whether a process was killed after the output was in place and before the folder was gone."""
        # the file named there was moved: the one data file of a plain run becomes the output itself
        path = self.folder / "joined"
        return path.exists() and self.output.exists() and not (self.folder / path.read_text()).exists()

    @property
    def _gone(self) -> Path:
        return self.folder.with_name(self.folder.name + ".done")

    def rows(self) -> int:
        """Rows that are stored, of all processes."""
        return int(self.records()["rows"].sum())

    def truncated(self) -> int:
        """How many of them were cut to the tokenizer's limit."""
        return int(self.records()["truncated"].sum())

    def blocks(self, records: NDArray[np.void]) -> Iterator[bytes]:
        """The bytes of windows, one after the other."""
        handles: dict[int, int] = {}
        try:
            for record in records:
                part, start, end = int(record["part"]), int(record["start"]), int(record["end"])
                if part not in handles:
                    handles[part] = os.open(self.folder / f"{part}.data", os.O_RDONLY)
                yield _read(handles[part], start, end - start)
        finally:
            for handle in handles.values():
                os.close(handle)

    def only_file(self, records: NDArray[np.void]) -> Path | None:
        """The data file that holds exactly these windows in this order, where there is one."""
        parts = set(records["part"].tolist())
        if len(parts) != 1:
            return None
        path = self.folder / f"{parts.pop()}.data"
        starts, ends = records["start"].tolist(), records["end"].tolist()
        in_order = starts == [self.reserve, *ends[:-1]] and path.stat().st_size == ends[-1]
        return path if in_order else None

    def replace_output(self, path: Path) -> None:
        """Put a finished file of the folder in the output's place, at once and for good."""
        sync(path)
        write_text(self.folder / "joined", path.name)
        os.replace(path, self.output)
        self.joined = True
        sync(self.output.parent)

    def lock_for_joining(self) -> bool:
        """Wait until no other process joins; False where one has, and the folder is gone."""
        try:
            handle = self._opened("join.lock")
        except FileNotFoundError:
            return False
        return lock(handle, wait=True) and is_at(handle, self.folder / "join.lock")

    def close(self) -> None:
        """Release the files; what is done stays."""
        while self._handles:
            os.close(self._handles.pop())

    def remove(self) -> None:
        """Delete the folder."""
        if not self.folder.exists():
            return
        shutil.rmtree(self._gone, ignore_errors=True)
        os.replace(self.folder, self._gone)  # at once: a folder half deleted would look like a run half done
        self.close()
        shutil.rmtree(self._gone)


def clear(output: Path) -> None:
    """Forget a stopped run. Raises ValueError where it is not stopped."""
    folder = output.with_name(output.name + ".part")
    for log in folder.glob("*.log"):
        handle = opened(log)
        stopped = lock(handle, wait=False)
        os.close(handle)
        if not stopped:
            raise ValueError(f"--overwrite: another process is writing {output}")
    shutil.rmtree(folder, ignore_errors=True)


def _check(records: NDArray[np.void]) -> NDArray[np.uint32]:
    body = RECORD.itemsize - 4
    raw = records.tobytes()
    return np.array([zlib.crc32(raw[k : k + body]) for k in range(0, len(raw), RECORD.itemsize)], dtype=np.uint32)


def _read_log(folder: Path, rank: int, check_data: bool = True) -> NDArray[np.void]:
    """The complete records of one process, as far as their bytes are in its data file."""
    raw = (folder / f"{rank}.log").read_bytes()
    records = np.frombuffer(raw[: len(raw) // RECORD.itemsize * RECORD.itemsize], RECORD)
    data = folder / f"{rank}.data"
    size = data.stat().st_size if data.exists() else 0
    good = (_check(records) == records["check"]) & ((records["end"] <= size) | (not check_data))
    return records[: len(records) if good.all() else int(np.argmin(good))]


def _write(handle: int, block: bytes) -> int:
    view = memoryview(block)
    written = 0
    while written < len(view):
        written += os.write(handle, view[written:])
    return written


def _read(handle: int, start: int, size: int) -> bytes:
    blocks = []
    while size:
        block = os.pread(handle, size, start)
        if not block:
            raise ValueError("a part file is shorter than its log says; begin anew with --overwrite")
        blocks.append(block)
        start, size = start + len(block), size - len(block)
    return b"".join(blocks)
