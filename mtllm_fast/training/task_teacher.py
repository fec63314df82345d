"""The task teacher of stage 3: whether it fits the student, and its parts in the student."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..data.read import MappedRows, TextRow
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
    order = _classes(head, labels, folder)
    return [_with_class(row, order, folder) for row in rows]


def _classes(head: HeadConfig, labels: Sequence[str] | None, folder: str) -> Sequence[int] | None:
    """The class of each label number; None for a head of choices."""
    if head.kind == "choice":  # the label is the number of a choice, of which rows have as many as they like
        return None
    if labels is not None:
        check_labels(folder, head.labels, labels)
    return range(len(head.labels)) if labels is None else [head.labels.index(name) for name in labels]


def check_labels(folder: str, own: Sequence[str], labels: Sequence[str]) -> None:
    """Raise ValueError where the model in `folder` has a head for other labels than the task's, in whatever order."""
    if sorted(own) != sorted(labels):
        raise ValueError(
            f"teacher={folder!r}: its head has the labels {', '.join(own)}, but the task has {', '.join(labels)}"
        )


def _with_class(row: TextRow, order: Sequence[int] | None, folder: str) -> TextRow:
    if row.label is None or order is None:
        return row
    if not 0 <= row.label < len(order):
        raise ValueError(f"teacher={folder!r}: has {len(order)} labels, but a row has the label {row.label}")
    return replace(row, label=order[row.label])


class TaughtLabels(MappedRows):
    """Training rows with their labels as classes of the teacher's head, by name; see `in_teachers_order`.

    Args:
        reader: what reads the labels, for the message.

    Raises:
        ValueError: as `in_teachers_order`; of rows at hand at once and of a stream when it is read, one that has no
            label, or the label of no class or choice.
    """

    def __init__(
        self, rows: Iterable[TextRow], head: HeadConfig, labels: Sequence[str] | None, folder: str, reader: str
    ) -> None:
        super().__init__(rows)
        self.order, self.folder, self.reader = _classes(head, labels, folder), folder, reader
        known = self if isinstance(rows, Sequence) else islice(self, 1)
        for _ in known:
            pass

    def change(self, row: TextRow) -> TextRow:
        name = repr(row.id if row.id is not None else row.text[:40])
        if row.label is None:
            raise ValueError(f"{self.reader}: needs the labels of all rows, but row {name} has none")
        if row.choices is not None and not 0 <= row.label < len(row.choices):
            raise ValueError(f"{self.reader}: row {name} has {len(row.choices)} choices and the label {row.label}")
        return _with_class(row, self.order, self.folder)


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
