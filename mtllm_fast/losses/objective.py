"""Weighted terms: their sums over a pack, what they are divided by, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .fused import FusedTerm, fused
from .table import TERMS
from .term import Given, LossTerm, Need, Side, Term, check_needs

if TYPE_CHECKING:
    from ..data.batch import Batch
    from ..models.heads import TaskHead
    from ..models.llm import LMHead


def make_terms(names: Iterable[str], **options: object) -> dict[str, Term]:
    """The terms of these names; each takes those of `options` that it has a field for.

    Raises:
        ValueError: a name that is none of `TERMS`.
    """
    made = {}
    for name in names:
        if name not in TERMS:
            raise ValueError(f"term {name!r}: expected one of {', '.join(TERMS)}")
        kind = TERMS[name]
        own: set[str] = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
        made[name] = kind(**{key: value for key, value in options.items() if key in own})
    return made


class Objective(nn.Module):
    """Weighted terms over one pack; those that can, share one fused op.

    Args:
        weights: by the name of the term in `TERMS`; 0 leaves it out.
        options: what the terms can be set to, such as temperature.

    Attributes:
        terms, term_weights: the active ones, by name.
        variance: what the sum of a term is divided by, by its name; of terms that are not named, nothing.
    """

    def __init__(self, weights: Mapping[str, float], **options: object) -> None:
        super().__init__()
        self.term_weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.terms = make_terms(self.term_weights, **options)
        self.variance: dict[str, float] = {}

    @property
    def needs(self) -> frozenset[Need]:
        """What its terms need."""
        return frozenset().union(*(term.needs for term in self.terms.values()))

    @property
    def inner_layer(self) -> int | None:
        """The LLM's layer, from 1, whose states a term needs besides the last ones."""
        contrast = self.terms.get("contrast")
        return getattr(contrast, "contrast_layer", None)

    def counts(self, batch: Batch) -> dict[str, float]:
        """What each term of `batch` is divided by once summed over the whole step; known before the forward."""
        return {name: term.count(batch) * batch.weight for name, term in self.terms.items()}

    def forward(
        self,
        student: Tensor,  # (T, D)
        teacher: Tensor | None,  # (T_llm, D)
        batch: Batch,
        *,
        lm_head: LMHead | None = None,
        task_head: TaskHead | None = None,
        side: Literal["mt", "llm"] = "mt",
        inner: tuple[Tensor, Tensor] | None = None,  # (T, D), (T_llm, D)
    ) -> dict[str, LossTerm]:
        """The active terms of `batch`, unweighted sums with their counts.

        Args:
            student: states of the packed rows of `side`; teacher: of `batch.llm`, where a term needs them.
            lm_head, task_head: where a term needs them. inner: of student and teacher, after `inner_layer`.

        Raises:
            ValueError: states and batch do not fit, or an active term lacks what it needs.
        """
        own = Side.of(batch, side, student, "student")
        taught = None if teacher is None else Side.of(batch, "llm", teacher, "teacher")
        between = None
        if inner is not None:
            between = Side.of(batch, side, inner[0], "student"), Side.of(batch, "llm", inner[1], "teacher")
        given = Given(batch, own, taught, lm_head, task_head, between)
        if teacher is not None and student.shape[1] != teacher.shape[1]:
            raise ValueError(f"student states are {student.shape[1]} wide, teacher states {teacher.shape[1]}")
        check_needs(self.terms, given)
        together = fused({name: term for name, term in self.terms.items() if isinstance(term, FusedTerm)}, given)
        terms = {n: together[n] if n in together else term.forward(given) for n, term in self.terms.items()}
        for name in terms.keys() & self.variance.keys():
            terms[name] = LossTerm(terms[name].sum / self.variance[name], terms[name].count)
        return terms

    def scaled(
        self, terms: Mapping[str, LossTerm], counts: Mapping[str, float], factor: float = 1.0
    ) -> dict[str, Tensor]:
        """`factor * sum / count` of each term, with the counts of the whole step."""
        return {name: term.sum * (factor / max(counts[name], 1e-9)) for name, term in terms.items()}

    def weighted(self, values: Mapping[str, Tensor]) -> Tensor:
        """The loss that values of the terms add up to."""
        return torch.stack([self.term_weights[name] * value for name, value in values.items()]).sum()

    def total(self, terms: Mapping[str, LossTerm], counts: Mapping[str, float]) -> Tensor:
        """`sum_k weight_k * sum_k / count_k` with the counts of the whole step."""
        return self.weighted(self.scaled(terms, counts))
