"""Files and folders that are whole or not there; locks; marks of completeness; failed writes in one line."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError

from .fingerprint import sha256_of

log = logging.getLogger(__name__)

MARKER = "complete.json"


def sync(path: Path) -> None:
    """Bring the bytes of a file, or the names in a folder, to the disk: a rename is otherwise only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_below(folder: Path) -> None:
    """Bring everything in a folder to the disk, but not its own name."""
    for path in folder.rglob("*"):
        sync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file to, which then takes its place: a reader sees the old or the whole new one.

    It ends as `path` does, for writers that go by the ending; nothing is left of it where writing fails.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: object) -> None:
    """Write plain data, and paths, as JSON, see `replacing`."""
    write_text(path, json.dumps(data, indent=2, default=str) + "\n")


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder its name, for good; a folder that has it makes way."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """`folder`, empty; afterwards it is gone, unless it was given another name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged(folder: Path, doing: str) -> Iterator[Path]:
    """An empty folder beside `folder` that nobody else writes, for `replace_folder`; else it is gone afterwards.

    What a killed process left in it is removed.

    Args:
        doing: what is done to make it, as "fetching"; its name ends so.

    Raises:
        ValueError: another process is at it.
    """
    staging = folder.with_name(f".{folder.name}.{doing}")
    staging.mkdir(exist_ok=True)
    handle = os.open(staging, os.O_RDONLY)
    try:
        if not lock(handle, wait=False):
            raise ValueError(f"--output {folder}: another process is {doing} it")
        if not is_at(handle, staging):
            raise ValueError(f"--output {folder}: another process has just finished {doing} it")
        for path in staging.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
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


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file or folder still has the name `path`. A lock on one that has not keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def lock(handle: int, *, wait: bool) -> bool:
    """Take the lock of an open file; False where another has it. The system takes it back when its holder is dead."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Exclusive between processes that name the same lock file, which stays."""
    with path.open("w") as handle:
        lock(handle.fileno(), wait=True)
        yield


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
            if is_at(handle, self.path):
                return True
            self.release()  # of a folder of this name that was deleted
        while True:
            handle = opened(self.path)
            try:
                free = lock(handle, wait=False)
            except OSError as error:  # a file system without locks is no reason to refuse work
                log.warning("%s: cannot be locked (%s); see to it that no other process writes there", self.path, error)
                free = True
            if is_at(handle, self.path):
                break
            os.close(handle)  # whoever held it let go between the two lines: others would lock a new file
        if not free:
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
        """Let go of the folder. The file goes while it is still locked, so that nobody can take one that is to go."""
        if (handle := self._held.pop(self.path, None)) is not None:
            if is_at(handle, self.path):  # else it is that of another process, in a new folder of this name
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
        record[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    sync_below(folder)
    write_text(folder / MARKER, json.dumps(record, indent=1))


def damage(checkpoint: Path) -> str | None:
    """Why `checkpoint` is not a complete one, None where it is. Reads every file: about a second per GB."""
    try:
        record = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {MARKER}"
    except (OSError, ValueError) as error:
        return f"{MARKER} cannot be read ({error})"
    return difference(checkpoint, record)


def difference(folder: Path, record: Mapping[str, Mapping[str, object]]) -> str | None:
    """How the files of `folder` differ from their sizes and digests in `record` ("bytes" and "sha256" by name), None
    where they do not."""
    try:
        for name, is_to_be in record.items():
            size = (folder / name).stat().st_size
            if size != is_to_be["bytes"]:
                return f"{name} has {size} bytes instead of {is_to_be['bytes']}"
        for name, is_to_be in record.items():
            if sha256_of(folder / name) != is_to_be["sha256"]:
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
