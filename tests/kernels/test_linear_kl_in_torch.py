"""linear_kl inside torch: opcheck, compile, autocast, checkpointing, repeated use, DDP and FSDP2."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import LinearKL, linear_kl, teacher_moments
from mtllm_fast.kernels import linear_kl_ops as ops
from torch.utils.checkpoint import checkpoint

from tests.kernels.linear_kl_cases import check, make_case


def test_opcheck():
    for flags in ({}, {"separate": True, "bias": True, "rows": True, "weights": True}):
        (h_s, w_s, h_t, w_t), o = make_case(pairs=5, width=8, vocab=19, **flags).arguments()
        rows = (o.get("rows_s"), o.get("rows_t"), o.get("row_weight"), -1)
        biases = (o.get("bias_s"), o.get("bias_t"))
        for divergence in ("forward", "jsd"):
            options = (2.0, 4.0, 3.0, divergence, 0.5, True, True, bool(flags))
            torch.library.opcheck(ops.difference.op, (h_s, w_s, h_t, w_t, *biases, *rows, *options))
        head, bias = w_s.detach(), None if biases[0] is None else biases[0].detach()
        teacher = (h_t, head if w_t is None else w_t, None if w_t is None else head, biases[1], bias, None, 2.0, 0.0)
        torch.library.opcheck(ops.moments_of.op, teacher)
        cached = ops.moments_of.op(*teacher)
        torch.library.opcheck(ops.moment_step.op, (h_s, head, bias, *cached, *rows, 2.0, 4.0, True))
    torch.library.opcheck(
        ops.scale_gradient.op, (torch.randn(3, 2, dtype=torch.bfloat16), torch.tensor(0.3), torch.float16)
    )


@pytest.mark.parametrize("form", ["difference", "moments"])
def test_compiles_without_a_graph_break(form):
    case = make_case(rows=True, weights=True)
    (h_s, w_s, h_t, _), options = case.arguments()
    w_s = w_s.detach()

    def loss(h, w, teacher):
        total, count = linear_kl(h * 2, w, teacher, form=form, **options)
        return total / count

    eager = loss(h_s, w_s, h_t)
    (expected,) = torch.autograd.grad(eager, h_s)
    fused = torch.compile(loss, backend="aot_eager", fullgraph=True)(h_s, w_s, h_t)
    (got,) = torch.autograd.grad(fused, h_s)
    assert torch.equal(fused, eager)
    assert torch.equal(got, expected)


def test_autocast_rounds_the_operands_and_nothing_else():
    case = make_case(pairs=32, width=64, vocab=1000, noise=0.05)
    rounded = make_case(torch.bfloat16, pairs=32, width=64, vocab=1000, noise=0.05)
    exact = rounded.exact()
    (h_s, w_s, h_t, _), _ = case.arguments()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_kl(h_s, w_s, h_t)
    (total * 0.5).backward()
    assert total.dtype == h_s.grad.dtype == w_s.grad.dtype == torch.float32
    check(total, exact["total"], 1e-3)  # a value of 0.004 per row, from fp32 logits
    check(h_s.grad, exact["dh"], 4e-3)
    check(w_s.grad, exact["dw"], 4e-3)


def test_gradient_checkpointing_and_double_use():
    case = make_case()
    (h_s, w_s, h_t, _), _ = case.arguments()

    def loss(h):
        return linear_kl(h, w_s, h_t)[0]

    (plain,) = torch.autograd.grad(loss(h_s), h_s)
    (saved,) = torch.autograd.grad(checkpoint(loss, h_s, use_reentrant=False), h_s)
    assert torch.equal(saved, plain)
    (twice,) = torch.autograd.grad(loss(h_s) + 3 * loss(h_s), h_s)
    torch.testing.assert_close(twice, 4 * plain)
    total = loss(h_s)
    first, second = (torch.autograd.grad(total, h_s, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_teacher_gets_no_gradient():
    (h_s, w_s, h_t, w_t), options = make_case(separate=True, bias=True).arguments()
    h_t.requires_grad_()
    w_t.requires_grad_()
    linear_kl(h_s, w_s, h_t, w_t, **options)[0].backward()
    assert h_t.grad is None
    assert w_t.grad is None
    assert not teacher_moments(h_t, w_t).m.requires_grad


def test_ddp_and_fsdp2_give_the_gradient_of_the_whole_batch(forked):
    for rank, out in enumerate(forked.group(code="from tests.kernels import two_processes as two; two.linear_kl()")):
        assert f"rank {rank} ok" in out


def test_module_has_no_state():
    assert not LinearKL().state_dict()
