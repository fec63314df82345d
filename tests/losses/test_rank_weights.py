"""Weights of rows in head_kl and task: by definition, and what those by the rank of the label save."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import DistillationLoss, DistillationWeights, Objective
from mtllm_fast.losses.head_kl import kl, label_ranks
from mtllm_fast.models import HeadConfig, TaskHead
from tests.conftest import assert_matches
from tests.losses import corrupted_teacher
from tests.losses.corrupted_teacher import Regime, World, measure, trained

D, LABELS = 16, (2, 0, 1, 1, 0)


@pytest.fixture
def pack() -> tuple[torch.Tensor, torch.Tensor, Batch, TaskHead]:
    torch.manual_seed(0)
    packed = PackedBatch.from_sequences([[1] * n for n in (3, 1, 4, 2, 5)])
    student = torch.randn(packed.num_tokens, D, requires_grad=True)
    head = TaskHead(D, HeadConfig(labels=("a", "b", "c"))).requires_grad_(False)
    batch = Batch(packed, packed, labels=torch.tensor(LABELS), ids=(None,) * 5)
    return student, torch.randn(packed.num_tokens, D), batch, head


def _means(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.stack([part.double().mean(0) for part in states.split(batch.mt.lengths)])


def _kl_by_hand(student: torch.Tensor, teacher: torch.Tensor, batch: Batch, head: TaskHead) -> torch.Tensor:
    """(B,) in float64, at temperature 2."""
    q, p = ((_means(x, batch) @ head.linear.weight.double().T / 2).softmax(-1) for x in (student, teacher))
    return 4 * (p * (p / q).log()).sum(-1)


def test_a_row_counts_by_the_rank_of_its_label(pack) -> None:
    student, teacher, batch, head = pack
    weights = DistillationWeights(0.0, head_kl=1.0, temperature=2.0, rank_weights=True)
    loss = DistillationLoss(weights)
    found = loss(student, teacher, batch, task_head=head)["head_kl"]
    order = (_means(teacher, batch) @ head.linear.weight.double().T).argsort(-1, descending=True).tolist()
    ranks = torch.tensor([row.index(label) + 1 for row, label in zip(order, LABELS)])
    assert set(ranks.tolist()) == {1, 2, 3}, "all kinds of rows are there"
    by_hand = _kl_by_hand(student, teacher, batch, head)
    assert_matches(found.sum, (by_hand / ranks).sum().float(), 1e-5)
    mine, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (found.sum, (by_hand / ranks).sum()))
    assert_matches(mine, theirs, 1e-5)
    assert float(by_hand.sum().detach()) > 1.05 * float(found.sum.detach()), "the control: without weights"
    # what the sum is divided by is known before the forward: the rows, whatever they weigh
    assert loss.counts(batch) == weights.counts(batch) == {"head_kl": 5.0} and float(found.count) == 5
    total = loss.total({"head_kl": found}, loss.counts(batch))
    assert_matches(total, ((by_hand / ranks).sum() / 5).float(), 1e-5)


def test_equal_logits_do_not_push_a_label_down() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    assert label_ranks(logits, torch.tensor([1, 3, 0])).tolist() == [1, 1, 4]


def test_a_teacher_that_is_right_changes_no_bit(pack) -> None:
    student, teacher, batch, head = pack
    said = (_means(teacher, batch).float() @ head.linear.weight.T).argmax(-1)
    found = []
    for ranked in (False, True):
        loss = Objective({"head_kl": 1.0}, temperature=2.0, rank_weights=ranked)
        term = loss(student, teacher, replace(batch, labels=said), task_head=head)["head_kl"].sum
        found.append((term, *torch.autograd.grad(term, student)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found))
    other = Objective({"head_kl": 1.0}, temperature=2.0, rank_weights=True)
    assert not torch.equal(other(student, teacher, batch, task_head=head)["head_kl"].sum, found[0][0]), "the control"


def test_rows_weigh_what_the_batch_says(pack) -> None:
    """`row_weight` in both terms, alone and beside the ranks; sums are divided by the sum of the weights."""
    student, teacher, batch, head = pack
    given = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.25])
    weighed = replace(batch, row_weight=given)
    by_hand = _kl_by_hand(student, teacher, batch, head)
    ranks = label_ranks(_means(teacher, batch) @ head.linear.weight.double().T, batch.labels)
    log_p = (_means(student, batch) @ head.linear.weight.double().T).log_softmax(-1)
    ce = -log_p[torch.arange(5), batch.labels]
    for ranked, weights in ((False, given), (True, given / ranks)):
        loss = Objective({"head_kl": 1.0, "task": 1.0}, temperature=2.0, rank_weights=ranked)
        terms = loss(student, teacher, weighed, task_head=head)
        assert loss.counts(weighed) == {"head_kl": 3.75, "task": 3.75}
        assert [float(term.count) for term in terms.values()] == [3.75, 3.75]
        assert_matches(terms["head_kl"].sum, (by_hand * weights).sum().float(), 1e-5)
        assert_matches(terms["task"].sum, (ce * given).sum().float(), 1e-5)
        plain = loss(student, teacher, batch, task_head=head)
        assert_matches(plain["task"].sum, ce.sum().float(), 1e-5)


def test_what_is_asked_for_is_needed(pack) -> None:
    student, teacher, batch, head = pack
    with pytest.raises(ValueError, match=r"rank_weights=True: weighs the rows of head_kl, but head_kl=0\.0"):
        DistillationWeights(rank_weights=True)
    weights = DistillationWeights(head_kl=1.0, rank_weights=True)
    assert "labels" in weights.needs and "labels" not in DistillationWeights(head_kl=1.0).needs
    with pytest.raises(ValueError, match="head_kl > 0 needs labels"):
        DistillationLoss(weights)(student, teacher, replace(batch, labels=None), task_head=head)
    assert float(kl(student, student).detach()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("hidden", "wrong"), [(0, "any"), (0, "next"), (64, "any")])
def test_half_of_what_a_corrupted_teacher_costs_is_recovered(hidden, wrong, monkeypatch) -> None:
    """Of the accuracy that 30 % wrong classes of the teacher cost, at the epoch that validation keeps."""
    monkeypatch.setattr(corrupted_teacher, "SEEDS", range(2))
    best, _ = measure(Regime(epochs=8, hidden=hidden, wrong=wrong), ("rank", "shuffled"))
    found, control = best["rank"], best["shuffled"]
    assert found.right - found.corrupted > 0.04, "the corruption costs something"
    assert found.recovered >= 0.5, found
    assert control.recovered < 0.2, "the same weights on other rows"


def test_a_student_that_learns_the_wrong_rows_by_heart_gains_little(monkeypatch) -> None:
    """The limit: a weight that is not 0 only makes it later. Why stage 3 keeps the best epoch, and not the last."""
    monkeypatch.setattr(corrupted_teacher, "SEEDS", range(1))
    best, last = measure(Regime(rows=200, epochs=60, hidden=128))
    assert last["rank"].recovered < 0.5 < best["rank"].recovered, (best, last)


def test_a_right_teacher_trains_the_same_student() -> None:
    regime = Regime(epochs=2)
    world = World.make(0, regime)
    plain, ranked = (trained(world, world.right, kind, regime)[2] for kind in ("none", "rank"))
    assert all(torch.equal(plain[name], ranked[name]) for name in plain)
    other = trained(world, world.corrupted, "rank", regime)[2]
    assert not any(torch.equal(plain[name], other[name]) for name in plain), "the control"
