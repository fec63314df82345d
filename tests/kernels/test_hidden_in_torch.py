"""The ops of hidden_mse, packed_projection and distillation_loss inside torch: opcheck, compile, DDP and FSDP2."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import distillation_loss, packed_projection, paired_mse, pooled_mse, segment_mean
from mtllm_fast.kernels import hidden_mse_ops as ops
from mtllm_fast.kernels import packed_projection_ops as projection_ops
from mtllm_fast.kernels.distillation_loss import _distillation

from tests.kernels.hidden_cases import pairs, states
from tests.kernels.projection_cases import make

SPANS = torch.tensor([[4, 9], [0, 2]])


def problem():
    student, teacher, *bounds = states("edges", width=8)
    rows_s, rows_t, weight = pairs(student, teacher, 9)
    return student.requires_grad_(), teacher, bounds, rows_s, rows_t, weight


def test_opcheck_of_the_losses():
    student, teacher, bounds, rows_s, rows_t, weight = problem()
    torch.library.opcheck(ops.segment_mean.op, (student, bounds[0], "mean"))
    torch.library.opcheck(ops.segment_mean.op, (student, SPANS, "spans"))
    paired, nothing = (rows_s, rows_t, weight, False), (None, None, None, False)
    for first, second in (
        ((*bounds, "last", torch.ones(7)), paired),
        ((SPANS, SPANS, "spans", None), nothing),
        ((None, None, "mean", None), paired),
    ):
        torch.library.opcheck(ops.hidden_loss.op, (student, teacher, *first, *second, True))
    own = (torch.ones(3), student.detach(), teacher, torch.randn(7, 8), bounds[0], "mean")
    torch.library.opcheck(ops.state_gradient.op, (*own, *paired, torch.randn(student.shape)))
    head = torch.randn(20, 8, requires_grad=True)
    bias = torch.randn(20, requires_grad=True)
    fixed = (-1, 2.0, 4.0, 0.0, "forward", 0.5)
    for has_pairs in (False, True):
        torch.library.opcheck(
            _distillation.op,
            (student, teacher, *bounds, "mean", None, rows_s, rows_t, weight, has_pairs, False, head, bias, None, None,
             None, *fixed, True, True, True),
        )  # fmt: skip
    torch.library.opcheck(
        _distillation.op,
        (student, teacher, None, None, "mean", None, rows_s, rows_t, weight, True, False, None, None, None, None, None,
         *fixed, True, False, False),
    )  # fmt: skip


def test_opcheck_of_the_projection():
    for boundaries in (False, True):
        c = make(width=6, out=8, norm="layer", boundaries=boundaries)
        leaves = [c[n].requires_grad_() for n in ("weight", "bias", "norm_weight", "norm_bias")]
        x = c["x"].view(-1, 6).requires_grad_()
        ends = [c.get(n) for n in ("cu_seqlens", "prefix", "suffix")]
        for e in ends[1:]:
            if e is not None:
                e.requires_grad_()
        arguments = (x, c["rows"], *leaves[:2], "layer", *leaves[2:], 1e-5, 1.7)
        torch.library.opcheck(
            projection_ops.packed_linear.op,
            (*arguments, "none" if boundaries else "gelu", *ends, torch.float32, not boundaries),
        )
        rows, tokens = c["rows"], c["rows"].shape[0]
        total = tokens + (7 * 3 if boundaries else 0)
        torch.library.opcheck(
            projection_ops.packed_linear_backward.op,
            (torch.randn(total, 8), x.detach(), rows, leaves[0].detach(), "layer", leaves[2].detach(),
             leaves[3].detach(), 1e-5, 1.7, "none", torch.empty(0, 8), ends[0], 2 * boundaries, 1 * boundaries,
             [False, boundaries], True, True, True, True),
        )  # fmt: skip


def losses(student, teacher, bounds, rows_s, rows_t, weight):
    """A function of the student for each op, and what it needs to be compiled."""
    head = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    ends = {"cu_seqlens_s": bounds[0], "cu_seqlens_t": bounds[1]}
    return {
        "segment_mean": lambda x: segment_mean(x * 2, bounds[0]).square().sum(),
        "pooled_mse": lambda x: torch.stack(pooled_mse(x * 2, teacher, *bounds)).prod(),
        "paired_mse": lambda x: paired_mse(x * 2, teacher, rows_s, rows_t, weight=weight)[0],
        "packed_projection": lambda x: packed_projection(x, head, norm="rms", prefix=head[:1, :1].expand(1, 20),
                                                         cu_seqlens=torch.tensor([0, x.shape[0]])).square().sum(),
        "distillation_loss": lambda x: sum(
            value for value, _ in distillation_loss(x * 2, teacher, **ends, paired=True, rows_s=rows_s, rows_t=rows_t,
                                                    pair_weight=weight, head=head)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", ["segment_mean", "pooled_mse", "paired_mse", "packed_projection", "distillation_loss"])
def test_compiles_without_a_graph_break(op):
    case = problem()
    student = case[0]
    function = losses(*case)[op]
    eager = function(student)
    (expected,) = torch.autograd.grad(eager, student)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(student)
    (got,) = torch.autograd.grad(compiled, student)
    assert torch.equal(compiled, eager)
    assert torch.equal(got, expected)


def test_views_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    student, teacher, bounds, *_ = problem()
    wide = student.detach().repeat(1, 2)[:, ::2].requires_grad_()
    assert not wide.is_contiguous()
    plain = wide.detach().contiguous().requires_grad_()
    other = teacher.repeat(1, 2)[:, ::2]
    (got,) = torch.autograd.grad(pooled_mse(wide, other, *bounds)[0], wide)
    (right,) = torch.autograd.grad(pooled_mse(plain, other.contiguous(), *bounds)[0], plain)
    assert torch.equal(got, right)
    saved = checkpoint(lambda x: pooled_mse(x, other, *bounds)[0], plain, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(saved, plain)[0], right)


def test_autocast_projects_in_bf16():
    c = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_projection(**c)
    assert y.dtype == torch.bfloat16


def test_ddp_and_fsdp2_give_the_gradient_of_the_whole_batch(forked):
    for rank, out in enumerate(forked.group(code="from tests.kernels import two_processes as two; two.distillation()")):
        assert f"rank {rank} ok" in out
