"""The task teacher of stage 3: whether it fits the student, and its parts in the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..data.read import TextRow
from ..models import MTLLM
from ..models.fingerprint import same_model
from ..models.heads import HeadConfig
from ..models.mtllm import MTLLMConfig
from ..models.names import is_path
from ..models.storage import based_on, read_config, read_safetensors

TEACHER = "teacher"


def check_teacher(student: MTLLMConfig, teacher: MTLLMConfig, folder: str) -> HeadConfig:
    """The teacher's head. Refuse one that is no LLM reader with a head, or sits on another LLM or attention mode.

    Raises:
        ValueError: naming what does not fit.
    """
    if teacher.reader != "llm" or teacher.head is None or "student" not in teacher.adapters:
        raise ValueError(f"teacher={folder!r}: not a task teacher; make one with `mtllm finetune --llm ...`")
    if teacher.causal != student.causal:
        raise ValueError(
            f"teacher={folder!r}: causal={teacher.causal}, but the student was adapted with causal={student.causal}"
        )
    mine, theirs = student.llm, teacher.llm
    if mine and theirs and not same_model(mine, theirs):
        raise ValueError(f"teacher={folder!r}: sits on the LLM {theirs!r}, the student on {mine!r}, which is another")
    return teacher.head


def in_teachers_order(
    head: HeadConfig, labels: Sequence[str] | None, rows: Sequence[TextRow], folder: str
) -> list[TextRow]:
    """Labelled rows with their labels as classes of the teacher's head, by name.

    Args:
        labels: names that the rows' labels are indices into; None: they are the teacher's, in its order.

    Raises:
        ValueError: the teacher has other labels, or fewer than the rows.
    """
    if head.kind == "choice":  # the label is the number of a choice, of which rows have as many as they like
        return list(rows)
    if labels is not None and sorted(labels) != sorted(head.labels):
        raise ValueError(
            f"teacher={folder!r}: its head has the labels {', '.join(head.labels)}, "
            f"but the task has {', '.join(labels)}"
        )
    order = range(len(head.labels)) if labels is None else [head.labels.index(name) for name in labels]
    wrong = next((row.label for row in rows if row.label is not None and not 0 <= row.label < len(order)), None)
    if wrong is not None:
        raise ValueError(f"teacher={folder!r}: has {len(order)} labels, but a row has the label {wrong}")
    return [row if row.label is None else replace(row, label=order[row.label]) for row in rows]


def teacher_config(folder: str, llm: str = "") -> MTLLMConfig:
    """The config of a task teacher; its LLM is `llm` where that is named and the one it was saved with has moved."""
    config = read_config(Path(folder), "teacher")
    if llm and config.llm and is_path(config.llm) and not Path(config.llm).exists():
        return based_on(config, folder, None, llm)
    return config


def add_teacher(student: MTLLM, folder: str, *, adapter: bool = True, llm: str = "") -> None:
    """Put the task teacher's head and, unless its states are cached, its adapter into the student, both frozen.

    Raises:
        ValueError: the teacher does not fit the student.
    """
    config = teacher_config(folder, llm)
    student.set_head(check_teacher(student.config, config, folder))
    own = student.require_llm()
    if adapter:
        own.add_adapter(config.adapters["student"], TEACHER)
    state = {
        name.replace(".student.", f".{TEACHER}."): value
        for name, value in read_safetensors(Path(folder), "model").items()
        if adapter or name.startswith("head.")
    }
    expected = {n for n in student.state_dict() if f".{TEACHER}." in n or n.startswith("head.")}
    if set(state) != expected:
        raise ValueError(f"teacher={folder!r}: its weights do not fit the student's LLM")
    student.load_state_dict(state, strict=False)
    own.train_adapter("student")
    assert student.head is not None
    student.head.requires_grad_(False)
