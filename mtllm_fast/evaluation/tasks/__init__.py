"""Tasks: labelled data sets in many languages. To add one, add its file here and its line in `TASKS`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .americasnli import AMERICASNLI
from .base import SPLITS, Task, canonical_split, nearest
from .belebele import BELEBELE
from .checks import RowIssues, check_rows, overlap
from .copa import COPA, XCOPA
from .custom import from_yaml
from .folder import FolderTask
from .hub import HubSet
from .kardesnlu import KARDESNLU
from .layout import Layout
from .mgsm import MGSM
from .mnli import MNLI
from .nli import NLI
from .nusax import NUSAX
from .sib200 import SIB200
from .table import Table
from .xnli import XNLI

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SIB200,
        NUSAX,
        NLI,
        MNLI,
        XNLI,
        AMERICASNLI,
        KARDESNLU,
        BELEBELE,
        XCOPA,
        COPA,
        MGSM,
    )
}

__all__ = [
    "SPLITS",
    "TASKS",
    "FolderTask",
    "HubSet",
    "Layout",
    "RowIssues",
    "Table",
    "Task",
    "canonical_split",
    "check_rows",
    "from_yaml",
    "get_task",
    "nearest",
    "overlap",
]


def get_task(task: str | Path | Task, source: str | Path | None = None, *, quoted: bool = True) -> Task:
    """A task by name; "folder" makes one from the folder `source` (columns text, text_pair where present, label, id
    where present); a path ending in .yaml or .yml is read by `from_yaml`.

    Args:
        quoted: csv quoting in the files of "folder"; False reads quote marks as text. Other tasks say it themselves.

    Raises:
        ValueError: no task of that name, a YAML file that describes none, or `quoted` for a task other than "folder".
    """
    if not quoted and task != "folder":
        raise ValueError(
            f"quoted=False (--no-quoted): is for the task 'folder'; {getattr(task, 'name', str(task))!r} says itself "
            "how its files are written (quoted: false in a .yaml file)"
        )
    if not isinstance(task, str | Path):
        return task
    name = str(task)
    if name.endswith((".yaml", ".yml")):
        return from_yaml(name, source)
    if name in TASKS:
        return TASKS[name]
    if name == "folder" and source is not None:
        return FolderTask.from_folder(source, quoted=quoted, **_columns(Path(source), quoted))
    if name == "folder":
        raise ValueError("task='folder': --data is missing: the folder of <language>/<split> files")
    raise ValueError(
        f"task={name!r}: expected one of {', '.join(TASKS)}, 'folder' with a folder of <language>/<split> files, "
        "or a .yaml file that describes one"
    )


def _columns(folder: Path, quoted: bool) -> dict[str, Any]:
    from .files import columns
    from .layout import find

    if not folder.is_dir():
        raise ValueError(f"source={str(folder)!r}: no such folder")
    files = find(folder, (Layout(),))
    if not files:
        raise ValueError(f"source={str(folder)!r}: no <language>/<split> files in it")
    present = columns(files[0].path, quoted=quoted)
    optional = {"pair_column": "text_pair", "id_column": "id"}
    return {argument: column for argument, column in optional.items() if column in present}
