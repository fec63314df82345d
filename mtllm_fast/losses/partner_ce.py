"""Cross-entropy of the task head on the translations that texts are read with (FILTER, arXiv 2009.05166)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

from .term import Given, LossTerm, Term, required

if TYPE_CHECKING:
    from ..data.batch import Batch


class PartnerCrossEntropy(Term):
    """`-sum_b w_b log softmax(head(pooled partner of b))[label_b]` over the texts that have a partner, w_b of
    `Batch.row_weight` or 1: a translation has the label of its text."""

    name = "partner_task"
    needs = frozenset({"task_head", "labels", "partners"})

    def count(self, batch: Batch) -> float:
        packed = batch.mt
        if packed is None or not packed.partners:
            return 0
        there = [row for row, length in enumerate(packed.lengths[1::2]) if length]
        return len(there) if batch.row_weight is None else float(batch.row_weight[there].sum())

    def forward(self, given: Given) -> LossTerm:
        batch, packed = given.batch, given.student.packed
        logits = required(given.task_head)(given.student.pooled_partners())
        weights = (packed.cu_seqlens.diff()[1::2] > 0).to(logits.dtype)
        if batch.row_weight is not None:
            weights = weights * batch.row_weight
        total = (F.cross_entropy(logits, required(batch.labels), reduction="none") * weights).sum()
        return LossTerm(total, total.new_tensor(self.count(batch)))
