"""Pieces of work that are done, each with the key that it was done under."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .durable import replacing

Key = Mapping[str, str]  # "model", "data", "settings" -> fingerprint


def differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """The names under which two keys or settings differ: those of `now` in its order, then those that it has lost.

    A name that one of them lacks counts as None there.
    """
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


class Ledger:
    """Small results under a folder, one file each, written whole or not at all. One with another key is not used.

    Attributes:
        reused, written: results that were found and are valid, and those that were written.
        stale: why those that were found and not valid were not, with their number.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cells={str(folder)!r}: expected a folder, got a file")
        self.reused = 0
        self.written = 0
        self.stale: Counter[str] = Counter()

    def read_record(self, name: tuple[str, ...], key: Key) -> dict[str, Any] | None:
        """The small JSON record of that name if it is there and valid."""
        path = self.path(name, ".json")
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not self.is_valid(content["key"], key):
                return None
            record = dict(content["record"])
        except (OSError, KeyError, TypeError, ValueError):
            self.stale["file damaged"] += 1
            return None
        self.reused += 1
        return record

    def write_record(self, name: tuple[str, ...], key: Key, record: Mapping[str, object]) -> None:
        text = json.dumps({"key": dict(key), "record": dict(record)}, ensure_ascii=False, indent=1) + "\n"
        self.write(self.path(name, ".json"), text.encode())

    def notes(self) -> list[str]:
        """What was reused and what was computed again, for the console."""
        lines = [f"{self.reused} finished parts found in {self.folder}"] if self.reused else []
        return lines + [f"{count} parts computed again: {reason}" for reason, count in sorted(self.stale.items())]

    def is_valid(self, before: Key, key: Key) -> bool:
        """Whether a result was made under `key`; if not, what has changed is noted."""
        changed = differing(before, key)
        if changed:
            self.stale[f"{' and '.join(changed)} changed"] += 1
        return not changed

    def path(self, name: tuple[str, ...], ending: str) -> Path:
        """Where a result lies; no name leads out of the folder."""
        parts = [quote(part, safe=" ") for part in name]
        parts = [f"%2E{part[1:]}" if part.startswith(".") else part for part in parts]
        return self.folder.joinpath(*parts[:-1], parts[-1] + ending)

    def write(self, path: Path, content: bytes) -> None:
        """Raises OSError, which says how to go on."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            reason = f"cannot write {path}: {error.strerror or error}; everything finished before is kept"
            raise OSError(error.errno, f"{reason}, free some space and run the same command again") from error
        self.written += 1
