"""A stage: who learns, from whom, by which terms, on which rows. The one place where teacher -> student -> loss stands.

Training, `mtllm profile`, `mtllm plan` and the benchmarks run this step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from ..data.batch import Batch
from ..data.prompt import Writing
from ..data.read import TextRow
from ..data.store import TokenStore
from ..losses import LossTerm, Objective
from ..models import MTLLM, PackedEncoder
from ..models.inputs import read_with_targets
from .record import Metrics

Rows = Iterable[TextRow] | TokenStore
Validate = Callable[[], dict[str, float]]


class Teaches(Protocol):
    """A teacher outside of the student, such as its states on disk."""

    @property
    def needs_tokens(self) -> bool:
        """Whether the batches that it teaches must have the LLM's tokens too."""
        ...

    def teach(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with the teacher's side, and the teacher's states (T_llm, D) of its packed rows, no gradient."""
        ...


class Stage(nn.Module):
    """One way to train: `stage(batch)` gives terms `(sum, count)`, `counts(batch)` their counts beforehand.

    A stage of another shape overrides `read` (what the student reads), `taught` (who teaches) or `sides`.

    Args:
        student: the model that is trained and saved.
        loss: its terms. They say by their needs whether a teacher runs, and whether rows are aligned.
        rows: re-iterable texts.
        teacher: in place of the student's own LLM.
        adapter: with which that LLM teaches; None: the bare one. It is no part of what is saved.
        train_projection: whether a projection is trained; None leaves it as it is.
        over_variance: divide terms by the variance of the teacher's states that they compare.
        writing: how the rows' targets are written, for a student that is to write them.
        validate: scores on English validation data; the best checkpoint is kept.
        notes: what the run's metrics say besides.
    """

    def __init__(
        self,
        student: MTLLM,
        loss: Objective,
        rows: Rows = (),
        *,
        teacher: Teaches | None = None,
        adapter: str | None = None,
        train_projection: bool | None = None,
        over_variance: bool = False,
        writing: Writing | None = None,
        validate: Validate | None = None,
        notes: Metrics | None = None,
    ) -> None:
        super().__init__()
        if (layer := loss.inner_layer) is not None and layer > (count := len(student.require_llm().layers)):
            raise ValueError(f"loss.contrast_layer={layer}: the LLM has {count} layers")
        self.student, self.loss, self.rows = student, loss, rows
        self.teacher, self.adapter = teacher, adapter
        self.over_variance, self.writing = over_variance, writing
        self.validate, self.notes = validate, notes or {}
        if student.projection is not None and train_projection is not None:
            student.projection.requires_grad_(train_projection)
        if student.projection is not None and student.projection.boundary is not None and writing is None:
            student.projection.boundary.requires_grad_(False)  # it stands before tokens that are written

    @property
    def sides(self) -> tuple[str, ...]:
        """The tokenizations that a batch needs."""
        own_llm = "teacher" in self.loss.needs and (self.teacher is None or self.teacher.needs_tokens)
        return ("mt", "llm") if own_llm else (self.student.side,)

    @property
    def align(self) -> bool:
        """Whether a batch needs the row pairs that end at the same character."""
        return "pairs" in self.loss.needs and self.writing is None

    @property
    def beside(self) -> PackedEncoder | None:
        """An encoder that teaches in every step and is no part of the student."""
        return None

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each active term."""
        return self.loss.term_weights

    def counts(self, batch: Batch) -> dict[str, float]:
        """What the terms of `batch` are divided by once summed over the whole step."""
        return self.loss.counts(batch)

    def taught(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with the teacher's side, and the teacher's states of its packed rows, no gradient."""
        if self.teacher is not None:
            return self.teacher.teach(batch)
        if batch.llm is None:
            raise ValueError("batch has no 'llm' side for the teacher; collate it with sides=('mt', 'llm')")
        return batch, self.student.teacher_states(batch.llm, self.adapter)

    def read(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The student's states (T, D) of the packed rows of its side, and the batch with that side as it was read."""
        side = self.student.side
        if self.writing is None:
            return batch, self.student.states(batch.side(side))
        packed, states, rows = read_with_targets(self.student, batch)
        return (batch if side == "llm" else replace(batch, mt=packed, mt_rows=rows)), states

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        """The terms of one pack. The teacher is first: nothing of the student is held meanwhile."""
        needs, student, layer = self.loss.needs, self.student, self.loss.inner_layer
        teacher = inner = None
        if layer is None:
            if "teacher" in needs:
                batch, teacher = self.taught(batch)
            batch, states = self.read(batch)
        else:
            llm = student.require_llm()
            with llm.states_after(layer) as theirs:
                batch, teacher = self.taught(batch)
            with llm.states_after(layer) as mine:
                batch, states = self.read(batch)
            inner = mine[0], theirs[0]
        lm_head = student.llm.lm_head if "lm_head" in needs and student.llm is not None else None
        return self.loss(
            states, teacher, batch, lm_head=lm_head, task_head=student.head, side=student.side, inner=inner
        )

    def step(self, batch: Batch) -> Tensor:
        """The loss of a step of one pack."""
        return self.loss.total(self(batch), self.counts(batch))
