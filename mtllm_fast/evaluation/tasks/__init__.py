"""Tasks: labelled data sets in many languages. To add one, add its file here and its line in `TASKS`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import SPLITS, Task, canonical_split, nearest
from .folder import FolderTask, Table
from .hub import HubSet
from .nli import NLI
from .nusax import NUSAX
from .sib200 import SIB200

TASKS: dict[str, Task] = {task.name: task for task in (SIB200, NUSAX, NLI)}

__all__ = ["SPLITS", "TASKS", "FolderTask", "HubSet", "Table", "Task", "canonical_split", "get_task", "nearest"]


def get_task(task: str | Task, source: str | Path | None = None) -> Task:
    """A task by name; "folder" makes one from the folder `source` (columns text, text_pair where present, label, id
    where present).

    Raises:
        ValueError: no task of that name.
    """
    if not isinstance(task, str):
        return task
    if task in TASKS:
        return TASKS[task]
    if task == "folder" and source is not None:
        return FolderTask.from_folder(source, **_columns(Path(source)))
    raise ValueError(
        f"task={task!r}: expected one of {', '.join(TASKS)}, or 'folder' with a folder of <language>/<split> files"
    )


def _columns(folder: Path) -> dict[str, Any]:
    from .files import ENDINGS, columns

    if not folder.is_dir():
        raise ValueError(f"source={str(folder)!r}: no such folder")
    splits = {alias for aliases in SPLITS.values() for alias in aliases}
    files = [
        path for path in sorted(folder.glob("*/*")) if path.name.endswith(ENDINGS) and path.name.split(".")[0] in splits
    ]
    if not files:
        raise ValueError(f"source={str(folder)!r}: no <language>/<split> files in it")
    present = columns(files[0])
    optional = {"pair_column": "text_pair", "id_column": "id"}
    return {argument: column for argument, column in optional.items() if column in present}
