"""What a loss term is: what it needs, what it counts, and its `(sum, count)` over one pack.

A new term is a file with a subclass of `Term` and its line in `table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeVar

from torch import Tensor

from ..models.heads import TaskHead, partner_mean, segment_mean, span_mean

if TYPE_CHECKING:
    from ..data.batch import Batch
    from ..data.pack import PackedBatch
    from ..models.llm import LMHead

T = TypeVar("T")
Need = Literal["teacher", "pairs", "lm_head", "task_head", "labels", "targets", "soft_labels", "inner", "partners"]
Unit = Literal["rows", "pairs", "targets"]
Divergence = Literal["forward", "reverse", "jsd"]

MISSING: dict[Need, str] = {
    "teacher": "the teacher's states",
    "pairs": "aligned rows: collate the batch with align=True",
    "lm_head": "lm_head, the LLM's output head",
    "task_head": "task_head, a head on pooled states",
    "labels": "labels: the rows have none",
    "targets": "targets: the rows have none",
    "soft_labels": "soft labels: the rows have none",
    "inner": "the states of student and teacher after an inner layer",
    "partners": "the texts' translations: the model reads a text alone",
}


class LossTerm(NamedTuple):
    """One term over one pack: `weight * sum / (global count)` is its part of the loss."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # named as everywhere else, though tuples have a method `count`


@dataclass(frozen=True, eq=False)
class Side:
    """What one reader made of a pack.

    Fields:
        states: (T, D) of the packed rows.
        spans: (B, C, 2) packed rows of each choice, or None.
        pair_rows: (P,) packed rows that the other side has a partner of, or None.
    """

    states: Tensor
    packed: PackedBatch
    spans: Tensor | None = None
    pair_rows: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, name: Literal["mt", "llm"], states: Tensor, role: str) -> Side:
        """The side `name` of `batch` with its states. Raises ValueError where the two do not fit."""
        mt = name == "mt"
        packed = batch.mt if mt else batch.llm
        if packed is None:
            raise ValueError(f"{role}: the batch has no {name!r} side")
        if states.shape[0] != packed.num_tokens:
            raise ValueError(f"{role} has {states.shape[0]} rows, its packed batch has {packed.num_tokens} tokens")
        spans, pair_rows = (batch.mt_spans, batch.mt_rows) if mt else (batch.llm_spans, batch.llm_rows)
        return cls(states, packed, spans, pair_rows)

    def pooled(self) -> Tensor:
        """Mean states in float32: (B, D), or (B, C, D) of rows with choices."""
        return segment_mean(self.states, self.packed) if self.spans is None else span_mean(self.states, self.spans)

    def pooled_partners(self) -> Tensor:
        """Mean states (B, D) of the texts' partners in float32; zeros where a text has none."""
        return partner_mean(self.states, self.packed)


@dataclass(frozen=True, eq=False)
class Given:
    """What the terms of one pack are made from; labels, targets and row weights are in `batch`.

    inner: student and teacher after the LLM's layer that a term asks for.
    """

    batch: Batch
    student: Side
    teacher: Side | None = None
    lm_head: LMHead | None = None
    task_head: TaskHead | None = None
    inner: tuple[Side, Side] | None = None

    def has(self, need: Need) -> bool:
        if need == "pairs":
            return self.batch.mt_rows is not None and self.batch.llm_rows is not None
        if need == "partners":
            return self.student.packed.partners
        return getattr(self.batch if need in ("labels", "targets", "soft_labels") else self, need) is not None


class Term:
    """One term of an objective. What it can be set to are fields of a frozen dataclass, filled by name.

    Attributes:
        name: in `TERMS`, in weights and in the log.
        needs: what `Given` must hold; of an instance, as it is set.
        unit: what the sum is divided by: rows (texts), aligned pairs, target tokens.
        lm_head_products: products of the LM head with a row of states per unit, forward and backward.
        compares_texts: whether it compares the texts of a pack with each other. Its gradient then depends on which
            texts are packed together, and a pack cannot be computed in parts.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    unit: ClassVar[Unit] = "rows"
    lm_head_products: ClassVar[int] = 0
    compares_texts: ClassVar[bool] = False

    def count(self, batch: Batch) -> float:
        """The count of `forward`, known before it; a term that weighs rows sums `batch.row_weight` here."""
        if self.unit == "targets":
            return batch.targets.num_tokens if batch.targets is not None else 0
        return batch.num_pairs if self.unit == "pairs" else batch.num_rows

    def forward(self, given: Given) -> LossTerm:
        raise NotImplementedError

    def compared(self, teacher: Side) -> Tensor | None:
        """The teacher's rows (N, D) whose variance the term may be divided by; None where that means nothing."""
        return None


def rows_weighed(batch: Batch) -> float:
    """The count of a term that weighs rows: how many there are, or the sum of their weights."""
    return batch.num_rows if batch.row_weight is None else float(batch.row_weight.sum())


def check_needs(terms: Mapping[str, Term], given: Given) -> None:
    """Raises ValueError where a term lacks what it needs, naming both."""
    for need, what in MISSING.items():
        if lacking := [name for name, term in terms.items() if need in term.needs and not given.has(need)]:
            raise ValueError(f"{' and '.join(lacking)} > 0 needs {what}")


def required(value: T | None) -> T:
    """What `check_needs` has found to be there."""
    assert value is not None
    return value
