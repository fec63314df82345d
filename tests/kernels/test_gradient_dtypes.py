"""Gradients in 16 bits: sums over rows named twice are fp32, fp16 waits in fp32, autocast with a head of another dtype."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import distillation_loss, linear_kl, paired_mse, teacher_moments

from tests.kernels.linear_kl_cases import LIMITS, check, error, make_case

FORMS = ("difference", "moments")


def repeated(dtype: torch.dtype, times: int = 400):
    """One student row against `times` teacher rows: its gradient is a sum of as many."""
    case = make_case(dtype, pairs=times, width=16, vocab=40, noise=1.0)
    case.options |= {"rows_s": torch.zeros(times, dtype=torch.int64), "rows_t": torch.arange(times)}
    return case


def run(case, form: str, **extra):
    def function(h_s, w_s, h_t, w_t, **options):
        head = w_s if form == "difference" else w_s.detach()
        return linear_kl(h_s, head, h_t, w_t, form=form, **options, **extra)

    (h_s, w_s, h_t, w_t), options = case.arguments()
    total, _ = function(h_s, w_s, h_t, w_t, **options)
    (total * 0.5).backward()
    return h_s.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_named_twice_are_added_in_fp32(form, dtype):
    case = repeated(dtype)
    exact = case.exact()["dh"][:1]
    check(run(case, form)[:1], exact, LIMITS[dtype])
    # What this is about: added in the states' own dtype, the sum is off by more than the limit.
    terms = repeated(dtype)
    terms.options, terms.h_s = {}, case.h_s[:1].expand(400, -1)
    own = run(terms, form)
    total = torch.zeros(16, dtype=dtype)
    for row in own:
        total += row
    assert error(total[None], exact) > LIMITS[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_loss_scaling_reaches_small_weights_in_fp16(form):
    """Row weights of 1e-6 under a loss scale of 2^16: zeros, if the gradient were rounded to fp16 before the scale."""
    case = make_case(torch.float16, width=16, vocab=40)
    exact = case.exact()
    weight = torch.full((21,), 1e-6)
    for scale in (1.0, 65536.0):
        (h_s, w_s, h_t, _), _ = case.arguments()
        head = w_s if form == "difference" else w_s.detach()
        total, _ = linear_kl(h_s, head, h_t, w_s.detach(), form=form, row_weight=weight)
        (total * scale).backward()
        grads = {"dh": h_s.grad, "dw": w_s.grad} if form == "difference" else {"dh": h_s.grad}
        for name, grad in grads.items():
            assert grad.dtype == torch.float16
            off = error(grad.double() / (scale * 1e-6) * 0.5, exact[name])
            assert off < LIMITS[torch.float16] if scale > 1 else off > 0.01, name


def test_loss_scaling_reaches_small_weights_in_the_joint_loss():
    case = make_case(torch.float16, width=16, vocab=40)
    exact = case.exact()
    (h_s, w_s, h_t, _), _ = case.arguments()
    rows = torch.arange(21)
    term = distillation_loss(
        h_s, h_t, pooled=False, rows_s=rows, rows_t=rows, pair_weight=torch.full((21,), 1e-6), head=w_s
    )
    assert term.kl is not None
    (term.kl[0] * 65536.0).backward()
    for grad, name in ((h_s.grad, "dh"), (w_s.grad, "dw")):
        check(grad.double() / (65536.0 * 1e-6) * 0.5, exact[name], LIMITS[torch.float16])


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_a_head_of_another_dtype(state_dtype, head_dtype):
    """The joint loss under autocast: the head is cast to the states' dtype, its gradient comes back in its own."""
    case = make_case(state_dtype, width=16, vocab=40)
    rows = torch.arange(21)
    head = case.w_s.float().to(head_dtype).requires_grad_()
    student = case.h_s.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        terms = distillation_loss(student, case.h_t, pooled=False, paired=True, rows_s=rows, rows_t=rows, head=head)
    terms.kl[0].mul(0.5).backward()
    case.w_s = head.detach().to(state_dtype)
    exact = case.exact()
    assert (student.grad.dtype, head.grad.dtype) == (state_dtype, head_dtype)
    limit = LIMITS[torch.bfloat16 if torch.bfloat16 in (state_dtype, head_dtype) else torch.float32]
    check(student.grad, exact["dh"], limit)
    check(head.grad, exact["dw"], limit)


def test_advice_depends_on_autocast():
    h, w = torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(9, 4)
    rows = torch.arange(3)
    with pytest.raises(ValueError, match="cast one of them or use autocast"):
        distillation_loss(h, h, pooled=False, rows_s=rows, rows_t=rows, head=w)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError) as found:
        linear_kl(h.double(), w, h)  # autocast leaves float64 as it is
    assert str(found.value).endswith("cast one of them")


@pytest.mark.parametrize("shape", [(0, 4), (9, 0), (0, 0)])
def test_no_vocabulary_or_no_width(shape):
    h, w, rows = torch.randn(3, shape[1]), torch.randn(shape), torch.arange(3)
    calls = [
        lambda: linear_kl(h, w, h),
        lambda: linear_kl(h, w, h, w),
        lambda: teacher_moments(h, w),
        lambda: teacher_moments(torch.randn(3, 4), torch.randn(9, 4), w_s=w),
    ]
    if shape[1]:
        calls.append(lambda: distillation_loss(h, h, pooled=False, rows_s=rows, rows_t=rows, head=w))
    for call in calls:
        with pytest.raises(ValueError, match=r"must have at least one vocabulary row and a width of 1, got shape"):
            call()


def test_repeated_rows_of_the_paired_loss_are_added_in_fp32():
    g = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(n, 16, generator=g).bfloat16() for n in (2, 400))
    x = student.clone().requires_grad_()
    paired_mse(x, teacher, torch.zeros(400, dtype=torch.int64), torch.arange(400))[0].backward()
    check(x.grad[:1], 2 / 16 * (400 * student[:1].double() - teacher.double().sum(0)), LIMITS[torch.bfloat16])
