"""Cross-entropy of the task head (stage 2 and the baselines)."""

from __future__ import annotations

import torch.nn.functional as F

from .term import Given, LossTerm, Term, required


class TaskCrossEntropy(Term):
    """`-sum_b log softmax(head(pooled_b))[label_b]` over texts."""

    name = "task"
    needs = frozenset({"task_head", "labels"})

    def forward(self, given: Given) -> LossTerm:
        logits = required(given.task_head)(given.student.pooled())
        total = F.cross_entropy(logits, required(given.batch.labels), reduction="sum")
        return LossTerm(total, total.new_tensor(given.batch.num_rows))
