"""Cross-entropy of the tokens that are to be written, by the LM head.

MindMerger (arXiv 2405.17386) and LangBridge (arXiv 2401.10695) train by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels import linear_ce
from .term import Given, LossTerm, Term, required


@dataclass(frozen=True)
class TargetCrossEntropy(Term):
    """`-sum_i log softmax(z_i)[y_i]` over target tokens, without keeping logits; the head is frozen."""

    label_smoothing: float = 0.0

    name = "target_ce"
    needs = frozenset({"targets", "lm_head"})
    unit = "targets"
    lm_head_products = 2  # the student, the gradient of its states

    def forward(self, given: Given) -> LossTerm:
        head, targets = required(given.lm_head), required(given.batch.targets)
        total, count = linear_ce(
            given.student.states,
            head.weight.detach(),
            targets.input_ids,
            bias=None if head.bias is None else head.bias.detach(),
            rows=required(given.student.pair_rows),
            num_valid=targets.num_tokens,
            label_smoothing=self.label_smoothing,
            softcap=head.softcap,
        )
        return LossTerm(total, count)
