"""What weights by the rank of the label save where a share of the teacher's classes is wrong (arXiv 2309.17134).

    python -m tests.losses.corrupted_teacher        the table: regimes, accuracies, share of the lost accuracy recovered

Features of C classes go through a student, a linear layer or one with hidden units, to states that a frozen head reads;
head_kl is its loss and a teacher's states its targets. Of the teacher's rows 30 % name another class with the same
certainty: any other ("any"), or always the next ("next").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

import torch
from torch import Tensor, nn

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import Objective
from mtllm_fast.losses.head_kl import label_ranks
from mtllm_fast.models import HeadConfig, TaskHead

CLASSES, FEATURES, WIDTH, WRONG = 7, 32, 32, 0.3
SEEDS = range(5)
Weights = Literal["none", "rank", "shuffled"]


@dataclass(frozen=True)
class Regime:
    """Rows trained on, passes over them, hidden units of the student (0: linear), and which other class is named."""

    rows: int = 400
    epochs: int = 10
    hidden: int = 0
    wrong: Literal["any", "next"] = "any"


@dataclass(frozen=True)
class World:
    """One draw: features and labels to train, choose and test on, the head, and both teachers' states."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    head: TaskHead
    right: Tensor
    corrupted: Tensor

    @classmethod
    def make(cls, seed: int, regime: Regime) -> World:
        g = torch.Generator().manual_seed(seed)
        means = 3 * nn.functional.normalize(torch.randn(CLASSES, FEATURES, generator=g), dim=-1)

        def rows(count: int) -> tuple[Tensor, Tensor]:
            labels = torch.randint(CLASSES, (count,), generator=g)
            return means[labels] + torch.randn(count, FEATURES, generator=g), labels

        parts = rows(regime.rows), rows(300), rows(1700)
        labels = parts[0][1]
        head = TaskHead(WIDTH, HeadConfig(labels=tuple(map(str, range(CLASSES))))).requires_grad_(False)
        head.linear.weight.copy_(torch.linalg.qr(torch.randn(WIDTH, CLASSES, generator=g))[0].T)
        step = torch.randint(1, CLASSES, labels.shape, generator=g) if regime.wrong == "any" else 1
        noise = 0.3 * torch.randn(regime.rows, WIDTH, generator=g)
        bad = torch.rand(regime.rows, generator=g) < WRONG
        said = torch.where(bad, (labels + step) % CLASSES, labels)
        right, corrupted = (6 * head.linear.weight[classes] + noise for classes in (labels, said))
        return cls(*parts, head, right, corrupted)


def trained(world: World, teacher: Tensor, weights: Weights, regime: Regime) -> tuple[float, float, dict[str, Tensor]]:
    """Test accuracy at the epoch that is best on the validation rows, at the last one, and the last one's weights."""
    torch.manual_seed(0)
    (x, labels), rows = world.train, regime.rows
    student: nn.Module = nn.Linear(FEATURES, regime.hidden or WIDTH)
    if regime.hidden:
        student = nn.Sequential(student, nn.ReLU(), nn.Linear(regime.hidden, WIDTH))
    objective = Objective({"head_kl": 1.0}, temperature=2.0, rank_weights=weights == "rank")
    shuffled = (1 / label_ranks(world.head(teacher), labels))[torch.randperm(rows)]
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    seen = []
    for _ in range(regime.epochs):
        for part in torch.randperm(rows).split(32):
            packed = PackedBatch.from_sequences([[1]] * len(part))
            batch = Batch(packed, packed, labels=labels[part])
            if weights == "shuffled":
                batch = Batch(packed, packed, labels=labels[part], row_weight=shuffled[part])
            terms = objective(student(x[part]), teacher[part], batch, task_head=world.head)
            optimizer.zero_grad()
            objective.total(terms, objective.counts(batch)).backward()
            optimizer.step()
        with torch.no_grad():
            right = [(world.head(student(f)).argmax(-1) == gold) for f, gold in (world.valid, world.test)]
            seen.append([float(r.float().mean()) for r in right])
    return max(seen)[1], seen[-1][1], {k: v.clone() for k, v in student.state_dict().items()}


@dataclass(frozen=True)
class Found:
    """Mean accuracies over the seeds: of a right teacher, of a corrupted one, and of that with weights."""

    right: float
    corrupted: float
    weighted: float

    @property
    def recovered(self) -> float:
        """Share of the accuracy lost to the corruption."""
        return (self.weighted - self.corrupted) / (self.right - self.corrupted)


def measure(regime: Regime, kinds: Sequence[Weights] = ("rank",)) -> tuple[dict[str, Found], dict[str, Found]]:
    """By kind of weights: at the best epoch by validation, as stage 3 keeps it, and at the last one."""
    runs: list[list[tuple[float, float]]] = []
    for seed in SEEDS:
        world = World.make(seed, regime)
        runs.append([trained(world, world.right, "none", regime)[:2]])
        runs[-1] += [trained(world, world.corrupted, kind, regime)[:2] for kind in ("none", *kinds)]
    best, last = ([mean(run[i][at] for run in runs) for i in range(2 + len(kinds))] for at in (0, 1))
    return tuple(
        {kind: Found(*means[:2], weighted) for kind, weighted in zip(kinds, means[2:])} for means in (best, last)
    )  # type: ignore[return-value]


REGIMES = [
    Regime(epochs=epochs, hidden=hidden, wrong=wrong)
    for hidden, epochs in ((0, 3), (0, 20), (64, 3), (64, 20), (64, 100))
    for wrong in ("any", "next")
]


def main() -> None:
    print("| student | epochs | wrong class | kept | right teacher | 30 % wrong | weighted | recovered |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for regime in REGIMES:
        for kept, at in zip(("best", "last"), measure(regime)):
            found = at["rank"]
            student = f"{regime.hidden} hidden" if regime.hidden else "linear"
            figures = " | ".join(f"{100 * x:.1f}" for x in (found.right, found.corrupted, found.weighted))
            head = f"| {student} | {regime.epochs} | {regime.wrong} | {kept}"
            print(f"{head} | {figures} | {100 * found.recovered:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
