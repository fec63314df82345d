"""The LM head's KL as another divergence."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import teacher_moments
from mtllm_fast.kernels.linear_kl import reference

from mtllm_fast.data.batch import Batch
from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.losses.distillation import TargetWeights
from mtllm_fast.models.llm import LMHead
from tests.conftest import assert_matches

ROWS = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 3, 4, 5])


def _problem() -> tuple[torch.Tensor, torch.Tensor, Batch, LMHead]:
    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(n, 16, generator=generator) for n in (7, 6, 40))
    sides = (PackedBatch.from_sequences([[1] * n for n in lengths]) for lengths in ((3, 4), (2, 4)))
    return student.requires_grad_(), teacher, Batch(*sides, *ROWS), LMHead(weight, None, 4.0)


@pytest.mark.parametrize(("divergence", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.3), ("jsd", 1.0)])
def test_it_is_that_of_the_definition(divergence, beta) -> None:
    student, teacher, batch, head = _problem()
    weights = DistillationWeights(pooled_mse=0.0, kl=1.0, temperature=2.0, divergence=divergence, beta=beta)
    term = DistillationLoss(weights)(student, teacher, batch, lm_head=head)["kl"]
    exact, count, _ = reference(
        student.double(),
        head.weight.double(),
        teacher.double(),
        rows_s=ROWS[0],
        rows_t=ROWS[1],
        temperature=2.0,
        softcap=4.0,
        divergence=divergence,
        beta=beta,
    )
    assert term.count == count == 4
    (mine,), (right,) = (torch.autograd.grad(total, student, retain_graph=True) for total in (term.sum, exact))
    assert_matches(term.sum, exact.float(), 1e-5)
    assert_matches(mine, right, 1e-5)


def test_each_is_another_number() -> None:
    student, teacher, batch, head = _problem()
    options = [{}, {"divergence": "reverse"}, {"divergence": "jsd"}, {"divergence": "jsd", "beta": 0.1}]
    losses = [DistillationLoss(DistillationWeights(0.0, kl=1.0, **one)) for one in options]
    found = [float(loss(student.detach(), teacher, batch, lm_head=head)["kl"].sum) for loss in losses]
    assert len({round(value, 3) for value in found}) == len(options)


def test_moments_give_the_forward_kl_alone() -> None:
    student, teacher, batch, head = _problem()
    head = LMHead(head.weight, None, None)
    plain = DistillationLoss(DistillationWeights(0.0, kl=1.0))
    live = plain(student, teacher, batch, lm_head=head)["kl"].sum
    batch = Batch(batch.mt, batch.llm, *ROWS, moments=teacher_moments(teacher, head.weight))
    nothing = torch.full_like(teacher, torch.nan)  # the moments stand for the states
    assert_matches(plain(student, nothing, batch, lm_head=head)["kl"].sum, live, 1e-4)
    reverse = DistillationLoss(DistillationWeights(0.0, kl=1.0, divergence="reverse"))
    with pytest.raises(ValueError, match="divergence is 'reverse', but the moment form computes only 'forward'"):
        reverse(student, teacher, batch, lm_head=head)


@pytest.mark.parametrize("kind", [DistillationWeights, TargetWeights])
def test_bad_settings_are_named(kind) -> None:
    with pytest.raises(ValueError, match="divergence='kl': expected one of forward, reverse, jsd"):
        kind(divergence="kl")
    with pytest.raises(ValueError, match=r"beta=1\.5: must be between 0 and 1"):
        kind(beta=1.5)
