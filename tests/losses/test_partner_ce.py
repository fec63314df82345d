"""The terms of texts that are read with their translations, by hand, and FILTER's objective of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import LabelWeights
from mtllm_fast.models import HeadConfig, TaskHead
from tests.conftest import assert_matches

D = 8
LENGTHS = (3, 2, 1, 0, 4, 5)  # text, partner, text, none, text, partner
LABELS = (2, 1, 0)
SOFT = ((-0.1, -2.5, -5.0), (-3.0, -0.2, -2.0), (-1.0, -1.5, -0.9))


@pytest.fixture
def pack() -> tuple[torch.Tensor, Batch, TaskHead]:
    torch.manual_seed(0)
    packed = PackedBatch.from_sequences([[1] * n for n in LENGTHS], partners=True)
    states = torch.randn(packed.num_tokens, D, requires_grad=True)
    batch = Batch(packed, None, labels=torch.tensor(LABELS), soft_labels=torch.tensor(SOFT), ids=(None,) * 3)
    return states, batch, TaskHead(D, HeadConfig(labels=("a", "b", "c")))


def log_probabilities(states: torch.Tensor, head: TaskHead, first: int, temperature: float = 1.0) -> list[torch.Tensor]:
    """Of the texts (first 0) or their partners (1), in float64; an empty one is left out."""
    parts = states.double().split(LENGTHS)[first::2]
    return [
        F.log_softmax(part.mean(0) @ head.linear.weight.double().T / temperature, -1) for part in parts if len(part)
    ]


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0)])
def test_the_term_is_the_cross_entropy_of_the_partners(pack, weights) -> None:
    states, batch, head = pack
    if weights is not None:
        batch = Batch(batch.mt, None, labels=batch.labels, ids=batch.ids, row_weight=torch.tensor(weights))
    loss = LabelWeights(task=0.0, partner_task=1.0).objective()
    found = loss(states, None, batch, task_head=head)["partner_task"]
    w = weights or (1.0, 1.0, 1.0)
    first, last = log_probabilities(states, head, 1)
    right = -w[0] * first[LABELS[0]] - w[2] * last[LABELS[2]]
    assert found.count == w[0] + w[2] and loss.counts(batch) == {"partner_task": w[0] + w[2]}
    assert_matches(found.sum.detach(), right.detach(), 1e-5)
    mine, theirs = (torch.autograd.grad(total, (states, head.linear.weight)) for total in (found.sum, right))
    for one, other in zip(mine, theirs, strict=True):
        assert_matches(one, other.to(one.dtype), 1e-5)
    texts = mine[0].split(LENGTHS)[::2]
    assert all(not part.any() for part in texts), "the texts have no part in it"
    (text, _, third) = log_probabilities(states, head, 0)
    with pytest.raises(AssertionError):  # the texts instead
        assert_matches(found.sum.detach(), (-w[0] * text[LABELS[0]] - w[2] * third[LABELS[2]]).detach(), 1e-2)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 1.0), (0.2, 2.0)])
def test_filters_objective(pack, alpha: float, temperature: float) -> None:
    """CE of the translation into English + (1 - alpha) CE + alpha T^2 KL of the text, each a mean over its rows."""
    states, batch, head = pack
    weights = LabelWeights(task=1 - alpha, partner_task=1.0, label_kl=alpha, temperature=temperature)
    loss = weights.objective()
    found = loss.total(loss(states, None, batch, task_head=head), loss.counts(batch))
    texts, partners = log_probabilities(states, head, 0), log_probabilities(states, head, 1)
    p = torch.softmax(torch.tensor(SOFT, dtype=torch.float64) / temperature, -1)
    q = log_probabilities(states, head, 0, temperature)
    kl = temperature**2 * sum((p[i] * (p[i].log() - q[i])).sum() for i in range(3)) / 3
    task = -sum(texts[i][label] for i, label in enumerate(LABELS)) / 3
    partner = -(partners[0][LABELS[0]] + partners[1][LABELS[2]]) / 2
    right = partner + (1 - alpha) * task + alpha * kl
    assert_matches(found.detach(), right.detach(), 1e-5)
    for wrong in (
        partner + (1 - alpha) * task + alpha * kl / 3,  # a mean over classes, too, as the published code has
        partner + task + alpha * kl,
        (1 - alpha) * (partner + task) + alpha * kl,
    ):
        with pytest.raises(AssertionError):
            assert_matches(found.detach(), wrong.detach(), 1e-3)


def test_a_pack_without_a_partner_has_no_part_in_the_term(pack) -> None:
    _, _, head = pack
    packed = PackedBatch.from_sequences([[1, 2], [], [3], []], partners=True)
    states = torch.randn(3, D, requires_grad=True)
    loss = LabelWeights(task=0.0, partner_task=1.0).objective()
    batch = Batch(packed, None, labels=torch.tensor([0, 1]), ids=(None,) * 2)
    found = loss(states, None, batch, task_head=head)["partner_task"]
    assert (found.sum, found.count) == (0, 0) and loss.counts(batch) == {"partner_task": 0}
    (gradient,) = torch.autograd.grad(found.sum, states)
    assert not gradient.any() and gradient.isfinite().all()
    other = Batch(packed, None, labels=torch.tensor([1, 0]), ids=(None,) * 2, row_weight=torch.tensor([1.0, 2.0]))
    assert loss.counts(other) == {"partner_task": 0}


def test_a_model_that_reads_a_text_alone_is_refused(pack) -> None:
    states, batch, head = pack
    loss = LabelWeights(task=0.0, partner_task=1.0).objective()
    alone = Batch(PackedBatch.from_sequences([[1] * n for n in (5, 6, 4)]), None, labels=batch.labels, ids=batch.ids)
    assert loss.counts(alone) == {"partner_task": 0}
    with pytest.raises(
        ValueError, match="partner_task > 0 needs the texts' translations: the model reads a text alone"
    ):
        loss(states, None, alone, task_head=head)
