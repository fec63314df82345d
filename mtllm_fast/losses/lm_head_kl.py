"""KL of the LM head's distributions at rows that end at the same character."""

from __future__ import annotations

from dataclasses import dataclass

from .fused import Arguments, FusedTerm, pair_arguments
from .term import Divergence, Given, required


@dataclass(frozen=True)
class LMHeadKL(FusedTerm):
    """`tau^2 * sum_p KL(softmax(z_t / tau) || softmax(z_s / tau))` over aligned pairs; the head is frozen.

    Or another divergence of `kernels.linear_kl`. Where the batch has the teacher's moments, they stand for its states.
    """

    temperature: float = 1.0
    divergence: Divergence = "forward"
    beta: float = 0.5

    name = "kl"
    needs = frozenset({"teacher", "pairs", "lm_head"})
    unit = "pairs"
    lm_head_products = 3  # teacher, student, the gradient of its states

    def arguments(self, given: Given) -> Arguments:
        head = required(given.lm_head)
        return {
            "head": head.weight.detach(),
            "head_bias": None if head.bias is None else head.bias.detach(),
            "softcap": head.softcap,
            "temperature": self.temperature,
            "divergence": self.divergence,
            "beta": self.beta,
            "moments": given.batch.moments,
            **pair_arguments(given),
        }
