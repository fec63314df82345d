"""Every term of the distillation loss against its definition, and the loss object's contract."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.losses.head_kl import kl
from mtllm_fast.models import HeadConfig, TaskHead, segment_mean, span_mean
from mtllm_fast.models.llm import LMHead
from tests.conftest import assert_matches

D, V = 16, 50


def _packed(lengths: tuple[int, ...]) -> PackedBatch:
    return PackedBatch.from_sequences([[1] * n for n in lengths])


@pytest.fixture
def pack() -> tuple[torch.Tensor, torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(0)
    mt, llm = _packed((5, 1, 63, 3)), _packed((4, 2, 65, 3))
    rows = torch.tensor([0, 3, 5, 40, 71]), torch.tensor([1, 2, 4, 44, 73])
    student = torch.randn(mt.num_tokens, D, generator=generator, requires_grad=True)
    teacher = torch.randn(llm.num_tokens, D, generator=generator)
    return student, teacher, Batch(mt, llm, *rows, ids=(None,) * 4)


def _mean_by_loop(states: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    bounds = batch.cu_seqlens.tolist()
    return torch.stack(
        [states[a:b].double().mean(0) if b > a else states.new_zeros(D).double() for a, b in pairwise(bounds)]
    )


def test_segment_mean_against_a_loop() -> None:
    batch = _packed((0, 1, 64, 0, 7))
    states = torch.randn(batch.num_tokens, D, requires_grad=True)
    probe = torch.randn(5, D)
    assert_matches(segment_mean(states, batch), _mean_by_loop(states, batch).float(), 1e-6)
    assert segment_mean(states, batch)[0].abs().max() == 0
    (mine,) = torch.autograd.grad((segment_mean(states, batch) * probe).sum(), states)
    (loop,) = torch.autograd.grad((_mean_by_loop(states, batch) * probe).sum(), states)
    assert_matches(mine, loop, 1e-6)


def test_span_mean_against_a_loop() -> None:
    states = torch.randn(30, D)
    spans = torch.tensor([[[0, 3], [3, 4]], [[10, 20], [29, 30]]])
    loop = torch.stack([torch.stack([states[a:b].mean(0) for a, b in row]) for row in spans.tolist()])
    assert_matches(span_mean(states, spans), loop, 1e-6)


def test_terms_against_definitions(pack) -> None:
    student, teacher, batch = pack
    torch.manual_seed(0)
    head, lm_head = TaskHead(D, HeadConfig(labels=("a", "b", "c"))), LMHead(torch.randn(V, D), torch.randn(V), None)
    weights = DistillationWeights(1.0, 1.0, 1.0, 1.0, temperature=2.0)
    terms = DistillationLoss(weights)(student, teacher, batch, lm_head=lm_head, task_head=head)
    assert {name: float(term.count) for name, term in terms.items()} == weights.counts(batch)
    pooled = [_mean_by_loop(x, side) for x, side in ((student, batch.mt), (teacher, batch.llm))]
    s, t = student[batch.mt_rows].double(), teacher[batch.llm_rows].double()

    def kl_by_hand(zs: torch.Tensor, zt: torch.Tensor) -> torch.Tensor:
        p, q = torch.softmax(zt / 2.0, -1), torch.softmax(zs / 2.0, -1)
        return 4.0 * (p * (p / q).log()).sum()

    w, b = lm_head.weight.double(), lm_head.bias.double()
    expected = {
        "pooled_mse": (pooled[0] - pooled[1]).square().mean(-1).sum(),
        "paired_mse": (s - t).square().mean(-1).sum(),
        "kl": kl_by_hand(s @ w.T + b, t @ w.T + b),
        "head_kl": kl_by_hand(*(x @ head.linear.weight.double().T for x in pooled)),
    }
    for name, value in expected.items():
        assert_matches(terms[name].sum, value.float(), 1e-5)
        (mine,) = torch.autograd.grad(terms[name].sum, student, retain_graph=True)
        (theirs,) = torch.autograd.grad(value, student, retain_graph=True)
        assert_matches(mine, theirs, 1e-5)


def test_no_pairs_gives_zero_and_a_zero_gradient(pack) -> None:
    student, teacher, batch = pack
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(batch.mt, batch.llm, none, none, ids=batch.ids)
    loss = DistillationLoss(DistillationWeights(0.0, 1.0, 1.0))
    terms = loss(student, teacher, batch, lm_head=LMHead(torch.randn(V, D), None, None))
    total = loss.total(terms, {"paired_mse": 0.0, "kl": 0.0})
    (gradient,) = torch.autograd.grad(total, student)
    assert float(total.detach()) == 0.0
    assert float(gradient.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pooled_mse": -1.0}, "pooled_mse"),
        ({"temperature": 0.0}, "temperature"),
        ({"pooled_mse": 0.0}, "at least one"),
        ({"kl": float("nan")}, "kl"),
    ],
)
def test_bad_weights(arguments, named) -> None:
    with pytest.raises(ValueError, match=named):
        DistillationWeights(**arguments)


def test_bad_calls(pack) -> None:
    student, teacher, batch = pack
    with pytest.raises(ValueError, match="student has 71 rows"):
        DistillationLoss()(student[:-1], teacher, batch)
    with pytest.raises(ValueError, match="16 wide"):
        DistillationLoss()(student, teacher[:, :8], batch)
    with pytest.raises(ValueError, match="lm_head"):
        DistillationLoss(DistillationWeights(kl=1.0))(student, teacher, batch)
    with pytest.raises(ValueError, match="task_head"):
        DistillationLoss(DistillationWeights(head_kl=1.0))(student, teacher, batch)
    with pytest.raises(ValueError, match="align=True"):
        DistillationLoss(DistillationWeights(kl=1.0))(student, teacher, Batch(batch.mt, batch.llm))
    with pytest.raises(ValueError, match="temperature"):
        kl(student, student, 0.0)


def test_the_heads_soft_cap_is_part_of_the_kl(pack) -> None:
    """Gemma 2 caps its logits: KL of the capped ones, by hand, in value and gradient."""
    student, teacher, batch = pack
    torch.manual_seed(0)
    head = LMHead(torch.randn(V, D), torch.randn(V), 3.0)
    term = DistillationLoss(DistillationWeights(0.0, 0.0, 1.0, temperature=2.0))(student, teacher, batch, lm_head=head)

    def log_probabilities(states: torch.Tensor) -> torch.Tensor:
        z = states.double() @ head.weight.double().T + head.bias.double()
        return (3.0 * torch.tanh(z / 3.0) / 2.0).log_softmax(-1)

    assert set(term) == {"kl"}
    s, t = log_probabilities(student[batch.mt_rows]), log_probabilities(teacher[batch.llm_rows])
    expected = 4.0 * (t.exp() * (t - s)).sum()
    assert_matches(term["kl"].sum, expected.float(), 1e-5)
    (mine,) = torch.autograd.grad(term["kl"].sum, student)
    (theirs,) = torch.autograd.grad(expected, student)
    assert_matches(mine, theirs, 1e-5)


def test_choices_count_as_texts(pack) -> None:
    """Four texts of two choices: the pooled MSE is a mean over a text's choices, the KL is over its choices' scores."""
    student, teacher, batch = pack
    mt_spans = torch.tensor([[[0, 2], [3, 5]], [[5, 6], [6, 8]], [[10, 40], [41, 60]], [[69, 70], [71, 72]]])
    llm_spans = torch.tensor([[[0, 1], [2, 4]], [[4, 5], [5, 6]], [[10, 20], [50, 70]], [[71, 72], [73, 74]]])
    batch = Batch(batch.mt, batch.llm, mt_spans=mt_spans, llm_spans=llm_spans, ids=batch.ids)
    head = TaskHead(D, HeadConfig("choice"))
    weights = DistillationWeights(1.0, 0.0, 0.0, 1.0, temperature=2.0)
    terms = DistillationLoss(weights)(student, teacher, batch, task_head=head)
    assert (
        {name: float(term.count) for name, term in terms.items()}
        == weights.counts(batch)
        == {"pooled_mse": 4, "head_kl": 4}
    )
    s, t = (
        torch.stack([torch.stack([states[a:b].double().mean(0) for a, b in row]) for row in spans.tolist()])
        for states, spans in ((student, mt_spans), (teacher, llm_spans))
    )
    p, q = ((x @ head.linear.weight.double()[0] / 2.0).softmax(-1) for x in (t, s))
    expected = {"pooled_mse": (s - t).square().mean(-1).mean(-1).sum(), "head_kl": 4.0 * (p * (p / q).log()).sum()}
    for name, value in expected.items():
        assert_matches(terms[name].sum, value.float(), 1e-5)
        (mine,) = torch.autograd.grad(terms[name].sum, student, retain_graph=True)
        (theirs,) = torch.autograd.grad(value, student, retain_graph=True)
        assert_matches(mine, theirs, 1e-5)


def test_variance_and_total(pack) -> None:
    """A term over its variance keeps its count; the total is the weighted sum of the terms over the counts of the step."""
    student, teacher, batch = pack
    loss = DistillationLoss(DistillationWeights(2.0, 0.5))
    plain = loss(student, teacher, batch)
    loss.variance = {"pooled_mse": 4.0}
    scaled = loss(student, teacher, batch)
    assert_matches(scaled["pooled_mse"].sum * 4.0, plain["pooled_mse"].sum, 1e-6)
    assert torch.equal(scaled["paired_mse"].sum, plain["paired_mse"].sum)
    assert float(scaled["pooled_mse"].count) == 4
    total = loss.total(plain, {"pooled_mse": 8.0, "paired_mse": 10.0})
    assert_matches(total, 2.0 * plain["pooled_mse"].sum / 8.0 + 0.5 * plain["paired_mse"].sum / 10.0, 1e-6)
    batch = Batch(batch.mt, batch.llm, batch.mt_rows, batch.llm_rows, ids=batch.ids, weight=0.0)
    assert loss.weights.counts(batch) == {"pooled_mse": 0.0, "paired_mse": 0.0}
