"""Folders that survive a crash: names and bytes brought to the disk, what is in them recorded, failures in one line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError

log = logging.getLogger(__name__)

MARKER = "complete.json"


def sync_folder(path: Path) -> None:
    """Bring the names in `path` to the disk: a rename is otherwise only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_folder_above(option: str, path: Path) -> None:
    """Raise ValueError where `path` lies in what is no folder; folders that are not there can be made."""
    for folder in path.absolute().parents:
        if folder.exists():
            if not folder.is_dir():
                raise ValueError(f"{option} {path}: {folder.name} is a file, not a folder")
            return


def opened(path: Path) -> int:
    """A descriptor to read and write `path`, made where it is missing."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def lock(handle: int, *, wait: bool) -> bool:
    """Take the lock of an open file; False where another has it. The system takes it back when its holder is dead."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class FolderLock:
    """That this process, and no other, writes into a folder. Taking it again in the same process is no conflict.

    A child of this process does not inherit it: workers that outlive a killed run would keep it from going on.
    """

    _held: ClassVar[dict[Path, int]] = {}

    def __init__(self, folder: Path) -> None:
        self.path = folder.resolve() / ".lock"

    def take(self) -> bool:
        """False where another process has it. The folder must be there."""
        handle = self._held.get(self.path)
        if handle is not None:
            if self.path.exists() and os.path.samestat(os.fstat(handle), self.path.stat()):
                return True
            self.release()  # of a folder of this name that was deleted
        handle = opened(self.path)
        try:
            mine = lock(handle, wait=False)
        except OSError as error:  # a file system without locks is no reason to refuse work
            log.warning("%s: cannot be locked (%s); see to it that no other process writes there", self.path, error)
            mine = True
        if not mine:
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} on {platform.node()}\n".encode())
        self._held[self.path] = handle
        return True

    def holder(self) -> str:
        """Who wrote itself into the lock last: "PID on MACHINE"."""
        try:
            return self.path.read_text(encoding="utf-8").strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        if (handle := self._held.pop(self.path, None)) is not None:
            self.path.unlink(missing_ok=True)
            os.close(handle)

    @classmethod
    def _forget(cls) -> None:
        for handle in cls._held.values():
            os.close(handle)
        cls._held.clear()


os.register_at_fork(after_in_child=FolderLock._forget)


def mark_complete(folder: Path) -> None:
    """Bring every file of `folder` to the disk, then record their sizes and digests in it."""
    record = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            record[path.relative_to(folder).as_posix()] = {"bytes": file.tell(), "sha256": digest}
    temporary = folder / f".{MARKER}"
    with temporary.open("w", encoding="utf-8") as marker:
        json.dump(record, marker, indent=1)
        marker.flush()
        os.fsync(marker.fileno())
    os.replace(temporary, folder / MARKER)
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        sync_folder(inner)


def damage(checkpoint: Path) -> str | None:
    """Why `checkpoint` is not a complete one, None where it is. Reads every file: about a second per GB."""
    try:
        record = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MARKER}"
    except (OSError, ValueError) as error:
        return f"{MARKER} cannot be read ({error})"
    return difference(checkpoint, record)


def difference(folder: Path, record: dict[str, dict[str, Any]]) -> str | None:
    """How the files of `folder` differ from their sizes and digests in `record` ("bytes" and "sha256" by name), None
    where they do not."""
    try:
        for name, is_to_be in record.items():
            size = (folder / name).stat().st_size
            if size != is_to_be["bytes"]:
                return f"{name} has {size} bytes instead of {is_to_be['bytes']}"
        for name, is_to_be in record.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != is_to_be["sha256"]:
                    return f"the content of {name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, TypeError, KeyError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def write_failure(error: BaseException) -> str | None:
    """The reason, where `error` says that something could not be written; each library has its own kind of error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if match := re.search(r"\(os error (\d+)\)", text):  # safetensors, tokenizers
        return os.strerror(int(match.group(1)))
    if isinstance(error, SafetensorError):
        return text
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return "the disk takes no more bytes"  # torch.save keeps the system's reason to itself
    return None


def room(folder: Path, needed: int) -> str:
    """What is needed and what is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"it needs {needed:,} bytes and {folder} has {shutil.disk_usage(folder).free:,} free"
