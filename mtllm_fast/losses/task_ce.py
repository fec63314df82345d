"""Cross-entropy of the task head (stage 2 and the baselines; beside the distillation terms in stage 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from .term import Given, LossTerm, Term, required, rows_weighed

if TYPE_CHECKING:
    from ..data.batch import Batch


class TaskCrossEntropy(Term):
    """`-sum_b w_b log softmax(head(pooled_b))[label_b]` over texts, w_b of `Batch.row_weight` or 1."""

    name = "task"
    needs = frozenset({"task_head", "labels"})

    def count(self, batch: Batch) -> float:
        return rows_weighed(batch)

    def forward(self, given: Given) -> LossTerm:
        logits, labels = required(given.task_head)(given.student.pooled()), required(given.batch.labels)
        if (weights := given.batch.row_weight) is None:
            total = F.cross_entropy(logits, labels, reduction="sum")
        else:
            total = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
        return LossTerm(total, total.new_tensor(rows_weighed(given.batch)))
