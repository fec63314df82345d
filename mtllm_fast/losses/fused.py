"""Terms that `kernels.distillation_loss` computes together, so that the gradient of the states is written once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kernels import distillation_loss
from .term import Given, LossTerm, Term, required

Arguments = dict[str, Any]  # of `distillation_loss`, by name


class FusedTerm(Term):
    """A term with a place in the fused op; by itself it is the op with this term alone."""

    def arguments(self, given: Given) -> Arguments:
        """Its part of the op's arguments."""
        raise NotImplementedError

    def per_text(self, term: LossTerm, given: Given) -> LossTerm:
        """The op's result, counted in the unit of the term."""
        return term

    def forward(self, given: Given) -> LossTerm:
        return fused({self.name: self}, given)[self.name]


def fused(terms: Mapping[str, FusedTerm], given: Given) -> dict[str, LossTerm]:
    """All of `terms` in one call; their names are those of the op's results."""
    if not terms:
        return {}
    student, teacher = given.student, required(given.teacher)
    arguments: Arguments = {"pooled": False}
    for term in terms.values():
        arguments |= term.arguments(given)
    found = distillation_loss(student.states, teacher.states.to(student.states.dtype), **arguments)
    return {name: term.per_text(LossTerm(*getattr(found, name)), given) for name, term in terms.items()}


def pair_arguments(given: Given) -> Arguments:
    """`align_rows` gives rows that ascend, so the backward need not sort them."""
    return {"rows_s": given.student.pair_rows, "rows_t": required(given.teacher).pair_rows, "rows_sorted": True}
