"""KL of the task head's distributions from those that the rows bring with them: a teacher that is not at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .head_kl import kl
from .term import Given, LossTerm, Term, required, rows_weighed

if TYPE_CHECKING:
    from ..data.batch import Batch


@dataclass(frozen=True)
class SoftLabelKL(Term):
    """`sum_b w_b kl(softmax(l_b / tau), softmax(head(pooled_b) / tau))` over texts, times tau^2; l_b is the row's
    log-probabilities of the classes, w_b that of `Batch.row_weight` or 1.

    It differs from the cross-entropy with soft labels by their entropy, which has no gradient.
    """

    temperature: float = 1.0

    name = "label_kl"
    needs = frozenset({"task_head", "soft_labels"})

    def count(self, batch: Batch) -> float:
        return rows_weighed(batch)

    def forward(self, given: Given) -> LossTerm:
        logits, soft = required(given.task_head)(given.student.pooled()), required(given.batch.soft_labels)
        total = kl(logits, soft, self.temperature, given.batch.row_weight)
        return LossTerm(total, total.new_tensor(rows_weighed(given.batch)))
