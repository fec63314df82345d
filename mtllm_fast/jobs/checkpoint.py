"""Checkpoints that are whole or not there.

    checkpoint-N/            state after step N; it has this name only once every file is on the disk
      complete.json          size and SHA-256 of every other file, written last
    .checkpoint-N/           one in the making, or what a killed run left of it; removed when the run is resumed

A kill leaves the last complete checkpoint. What the disk damages later is found by size and digest, and refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .durable import MARKER, damage, mark_complete, replace_folder, room, write_failure

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: str | Path) -> int:
    """N of checkpoint-N. Raises ValueError for another name."""
    match = _NAME.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ValueError(f"{str(checkpoint)!r} is not named checkpoint-N")
    return int(match.group(1))


def checkpoints(folder: Path) -> list[Path]:
    """Everything in `folder` that has a checkpoint's name, oldest step first."""
    return sorted((p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)), key=step_of)


def last_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none; newer ones that are damaged are named."""
    for path in reversed(checkpoints(folder)):
        if (why := damage(path)) is None:
            return path
        log.warning("%s is not a complete checkpoint (%s): it is left out", path, why)
    return None


def size_of(checkpoint: Path) -> int:
    """Bytes of a complete checkpoint."""
    record = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    return sum(entry["bytes"] for entry in record.values())


def staged(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is complete; hidden, so that nobody takes it for one."""
    return folder / f".checkpoint-{step}"


def clean(folder: Path) -> None:
    """Remove what a killed run left unfinished: checkpoints and models in the making, temporary JSON files and logs."""
    for path in (*folder.glob(".checkpoint-*"), *folder.glob(".saving-*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folder.glob(".*.json.*"), *folder.glob(".*.jsonl.*")):
        path.unlink(missing_ok=True)


def publish(folder: Path, step: int) -> Path:
    """Complete the staged checkpoint of `step` and give it its name; an incomplete one of that name makes way."""
    source, final = staged(folder, step), folder / f"checkpoint-{step}"
    mark_complete(source)
    replace_folder(source, final)
    return final


def rotate(folder: Path, newest: Path, keep: int, best: str | None) -> None:
    """Delete all but the `keep` latest checkpoints up to `newest`, which is complete; `best` stays too."""
    older = [path for path in checkpoints(folder) if step_of(path) <= step_of(newest)]
    for path in older[:-keep]:
        if best is None or path.name != Path(best).name:
            # under another name first: a kill must not leave half a checkpoint with the name of a whole one
            doomed = folder / f".{path.name}.old"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class Publisher:
    """Publishes staged checkpoints one at a time, in a thread of its own where `background` says so.

    Staged files lie in the page cache, which is the copy on the host: what the thread waits for is the disk. Its error
    is kept for `settle`.
    """

    def __init__(self, folder: Path, keep: int, background: bool) -> None:
        self.folder, self.keep, self.background = folder, keep, background
        self.newest: Path | None = None
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: OSError | None = None

    def publish(self, step: int, best: str | None) -> None:
        """Start publishing the staged checkpoint of `step`. Call `settle` before and afterwards."""
        assert self._thread is None, "the checkpoint before is not settled"
        self._step = step
        # not a daemon: a process that ends in an error still finishes the checkpoint that it began
        self._thread = threading.Thread(target=self._publish, args=(step, best), name=f"checkpoint-{step}")
        self._thread.start()
        if not self.background:
            self._thread.join()

    def _publish(self, step: int, best: str | None) -> None:
        try:
            self.newest = publish(self.folder, step)
        except OSError as error:
            self._error = error
            return
        try:
            rotate(self.folder, self.newest, self.keep, best)
        except OSError as error:
            log.warning("a checkpoint older than that of step %d could not be deleted: %s", step, error)

    def wait(self) -> None:
        """Until the checkpoint in flight is on disk, or has failed."""
        if self._thread is not None:
            self._thread.join()

    def settle(self) -> tuple[int, OSError] | None:
        """Wait for the checkpoint in flight; (its step, the error) where it could not be completed."""
        if self._thread is None:
            return None
        self.wait()
        self._thread, error, self._error = None, self._error, None
        if error is None:
            return None
        shutil.rmtree(staged(self.folder, self._step), ignore_errors=True)
        return self._step, error


@contextmanager
def explained_failure(what: str, folder: Path, needed: int) -> Iterator[None]:
    """Turns a failed write of `what` into an OSError that says how many bytes are needed and free, and what is kept.

    Raises:
        OSError: what was to be written in the block could not be.
    """
    try:
        yield
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        last = last_complete(folder)
        kept = f"; {last} is complete: free the space and continue with the same command and --resume" if last else ""
        raise OSError(f"{what} could not be written: {reason}; {room(folder, needed)}{kept}") from error
