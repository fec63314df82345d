"""Zero-shot evaluation: tasks, metrics, translate-test, and the suite over languages. Names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..inference.translator import Translator
    from .metrics import accuracy, macro_f1
    from .probe import LinearProbe, fit_probe
    from .results import LanguageScore, ModelScores, Scores
    from .suite import evaluate
    from .suite_file import Suite, read_suite, run_suite
    from .tasks import TASKS, FolderTask, Task, get_task

_HOME = {
    "accuracy": ".metrics",
    "macro_f1": ".metrics",
    "LinearProbe": ".probe",
    "fit_probe": ".probe",
    "LanguageScore": ".results",
    "ModelScores": ".results",
    "Scores": ".results",
    "evaluate": ".suite",
    "Suite": ".suite_file",
    "read_suite": ".suite_file",
    "run_suite": ".suite_file",
    "TASKS": ".tasks",
    "FolderTask": ".tasks",
    "Task": ".tasks",
    "get_task": ".tasks",
    "Translator": "..inference.translator",
}

__all__ = [
    "TASKS",
    "FolderTask",
    "LanguageScore",
    "LinearProbe",
    "ModelScores",
    "Scores",
    "Suite",
    "Task",
    "Translator",
    "accuracy",
    "evaluate",
    "fit_probe",
    "get_task",
    "macro_f1",
    "read_suite",
    "run_suite",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
