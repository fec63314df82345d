"""Finished parts of an evaluation on disk, so that a killed run loses at most the part it was in.

A cell is one model (one seed) in one language of one task: a small safetensors file with predictions, logits, gold
labels and ids. It is written whole or not at all, and carries the key it was computed under: what the model, the data
and the settings were. A cell whose key is not today's is computed again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

Key = Mapping[str, str]  # "model", "data", "settings" -> fingerprint


@dataclass(frozen=True, eq=False)
class Cell:
    """One model in one language.

    Fields:
        logits: (N, C) float32; predictions, gold: (N,) int64, their argmax and the right class.
        ids: N names of rows.
        mt_code, mapped: as in `LanguageScore`.
        blank: rows with an empty text.
        counts: things counted on the way, e.g. truncated texts.
        time_s: seconds spent predicting.
        skipped: why the model was not run in this language; then there are no rows.
    """

    logits: npt.NDArray[np.float32]
    predictions: npt.NDArray[np.int64]
    gold: npt.NDArray[np.int64]
    ids: tuple[str, ...] = ()
    mt_code: str | None = None
    mapped: bool = False
    blank: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    time_s: float = 0.0
    skipped: str = ""

    @classmethod
    def without_rows(cls, reason: str) -> Cell:
        nothing = np.zeros(0, np.int64)
        return cls(np.zeros((0, 0), np.float32), nothing, nothing, skipped=reason)


class CellStore:
    """Cells and small records under a folder.

    Attributes:
        reused: cells and records that were found and are valid.
        stale: why those that were found and not valid were not, with their number.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cells={str(folder)!r}: expected a folder, got a file")
        self.reused = 0
        self.written = 0
        self.stale: Counter[str] = Counter()

    def read_cell(self, name: tuple[str, ...], key: Key) -> Cell | None:
        """The cell of that name if it is there and valid."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name, ".safetensors")
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()["cell"])
                if not self._valid(about.pop("key"), key):
                    return None
                arrays = {part: file.get_tensor(part) for part in ("logits", "predictions", "gold")}
            cell = Cell(**arrays, **{**about, "ids": tuple(about["ids"])})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            self.stale["file damaged"] += 1
            return None
        self.reused += 1
        return cell

    def write_cell(self, name: tuple[str, ...], key: Key, cell: Cell) -> None:
        from safetensors.numpy import save

        about = {
            "key": dict(key), "ids": list(cell.ids), "mt_code": cell.mt_code, "mapped": cell.mapped,
            "blank": cell.blank, "counts": cell.counts, "time_s": cell.time_s, "skipped": cell.skipped,
        }  # fmt: skip
        arrays = {part: np.ascontiguousarray(getattr(cell, part)) for part in ("logits", "predictions", "gold")}
        content = save(arrays, metadata={"cell": json.dumps(about, ensure_ascii=False)})
        self._write(self._path(name, ".safetensors"), content)

    def read_record(self, name: tuple[str, ...], key: Key) -> dict[str, Any] | None:
        """The small JSON record of that name if it is there and valid."""
        path = self._path(name, ".json")
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not self._valid(content["key"], key):
                return None
            record = dict(content["record"])
        except (OSError, KeyError, TypeError, ValueError):
            self.stale["file damaged"] += 1
            return None
        self.reused += 1
        return record

    def write_record(self, name: tuple[str, ...], key: Key, record: Mapping[str, Any]) -> None:
        text = json.dumps({"key": dict(key), "record": dict(record)}, ensure_ascii=False, indent=1) + "\n"
        self._write(self._path(name, ".json"), text.encode())

    def notes(self) -> list[str]:
        """What was reused and what was computed again, for the console."""
        lines = [f"{self.reused} finished parts found in {self.folder}"] if self.reused else []
        return lines + [f"{count} parts computed again: {reason}" for reason, count in sorted(self.stale.items())]

    def _valid(self, found: Mapping[str, str], key: Key) -> bool:
        changed = [part for part in key if found.get(part) != key[part]]
        if changed:
            self.stale[f"{' and '.join(changed)} changed"] += 1
        return not changed

    def _path(self, name: tuple[str, ...], ending: str) -> Path:
        parts = [quote(part, safe=" ") for part in name]
        parts = [f"%2E{part[1:]}" if part.startswith(".") else part for part in parts]
        return self.folder.joinpath(*parts[:-1], parts[-1] + ending)

    def _write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomically(path, lambda temporary: temporary.write_bytes(content))
        except OSError as error:
            reason = f"cannot write {path}: {error.strerror or error}; everything finished before is kept"
            raise OSError(error.errno, f"{reason}, free some space and run the same command again") from error
        self.written += 1


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then move it there: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
