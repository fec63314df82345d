"""hidden_mse, packed_projection and distillation_loss on a GPU: `pytest -m gpu tests/kernels`. Skipped without one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mtllm_fast.kernels import distillation_loss, linear_kl, packed_projection, paired_mse, pooled_mse, segment_mean
from mtllm_fast.kernels import packed_projection_launch as launch
from mtllm_fast.kernels.hidden_mse import reference_mean
from mtllm_fast.kernels.packed_projection_ops import PackedLinear

from tests.kernels.hidden_cases import (
    LENGTHS,
    check_all,
    cu,
    exact_paired,
    exact_pooled,
    pairs,
    random_lengths,
    run_loss,
    states,
)
from tests.kernels.linear_kl_cases import LIMITS, check, exact_fp32_gemms, largest_error  # noqa: F401
from tests.kernels.projection_cases import exact, make, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_fp32_gemms"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [24, 1024, 4096]


def moved(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


on_gpu = partial(run_loss, device="cuda")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pooled(lengths, dtype, width):
    case = states(lengths, width=width, dtype=dtype)
    check_all(on_gpu(pooled_mse, *case), exact_pooled(*case), dtype)


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_poolings(pooling):
    student, teacher, *bounds = states("edges", width=100)
    options = {"pooling": pooling, "weight": torch.rand(7)}
    right = exact_pooled(student, teacher, *bounds, **options)
    check_all(on_gpu(pooled_mse, student, teacher, *bounds, **options), right, torch.float32)


def test_segment_mean_of_spans():
    student, *_ = states("edges", width=64)
    spans = torch.tensor([[70, 90], [60, 64], [0, 5], [8, 8], [91, 130], [131, 132]])
    check(segment_mean(student.cuda(), spans=spans.cuda()), reference_mean(student.double(), spans, "spans"), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_paired(dtype, width):
    student, teacher, *_ = states("edges", width=width, dtype=dtype)
    rows_s, rows_t, weight = pairs(student, teacher, 300)
    right = exact_paired(student, teacher, rows_s, rows_t, weight)
    check_all(on_gpu(paired_mse, student, teacher, rows_s, rows_t, weight=weight), right, dtype)


@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [0, 96])
def test_projection(norm, dtype, hidden):
    case = make(dtype=dtype, norm=norm, width=64, out=136, hidden=hidden, activation="gelu", boundaries=True, scale=1.7)
    wider = 1.0 if dtype == torch.float32 else 3.0
    check_all(run(packed_projection, case, device="cuda"), exact(case), dtype, wider)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.5, 100.0])
def test_both_paths_of_the_projection(fused, dtype, mean):
    case = make(
        dtype=dtype, norm="layer", width=1024, out=512, padded=False, mean=mean if dtype == torch.float16 else 0.5
    )
    c = {k: moved(v) for k, v in case.items()}
    c["w"], normed = c.pop("weight"), {"norm": "layer", "eps": 1e-5}
    y, _ = launch.packed_linear_triton(PackedLinear(**{**c, **normed}, dtype=dtype), fused)
    right = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    check(y, packed_projection(**right), 3 * LIMITS[dtype])


def test_distillation_equals_the_separate_terms():
    student, teacher, *bounds = (moved(v) for v in states("edges", width=64, dtype=torch.bfloat16))
    rows_s, rows_t, weight = (v.cuda() for v in pairs(student.cpu(), teacher.cpu(), 60))
    head = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16)
    gradients = []
    for joint in (True, False):
        x = student.detach().requires_grad_()
        if joint:
            terms = distillation_loss(
                x, teacher, cu_seqlens_s=bounds[0], cu_seqlens_t=bounds[1], paired=True, rows_s=rows_s, rows_t=rows_t,
                pair_weight=weight, head=head,
            )  # fmt: skip
        else:
            terms = (
                pooled_mse(x, teacher, *bounds),
                paired_mse(x, teacher, rows_s, rows_t, weight=weight),
                linear_kl(x, head, teacher, rows_s=rows_s, rows_t=rows_t, row_weight=weight),
            )
        (0.3 * terms[0][0] + 0.5 * terms[1][0] + 0.7 * terms[2][0]).backward()
        gradients.append(x.grad)
    check(gradients[0], gradients[1].double().cpu(), 1e-2)


def test_bitwise_repeatable_in_any_pack():
    """Split points depend on a segment alone, and nothing is added by atomics."""
    student, teacher, *bounds = states("dominant", width=512, dtype=torch.bfloat16, tail=0)
    first = on_gpu(pooled_mse, student, teacher, *bounds)
    for _ in range(3):
        again = on_gpu(pooled_mse, student, teacher, *bounds)
        assert all(torch.equal(first[name], again[name]) for name in first)
    alone = segment_mean(student[:700].cuda(), cu([700]).cuda())
    behind = segment_mean(torch.cat([student[700:], student[:700]]).cuda(), cu([1, 2, 3, 700]).cuda())
    assert torch.equal(alone[0], behind[3])


def test_nothing_waits_for_the_device():
    student, teacher, *bounds = (moved(v) for v in states("edges", width=64, dtype=torch.bfloat16))
    rows = torch.arange(20, device="cuda")
    x = student.requires_grad_()
    case = {k: moved(v) for k, v in make(dtype=torch.bfloat16, norm="layer", width=64, boundaries=True).items()}
    pooled_mse(x, teacher, *bounds)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pooled_mse(x, teacher, *bounds)[0].backward()
        paired_mse(x, teacher, rows, rows)[0].backward()
        packed_projection(**case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_values():
    """Rows beyond 2^31 values are addressed in 64 bits."""
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    rows = 2**31 // 4096 + 64
    x = torch.zeros(rows, 4096, device="cuda", dtype=torch.bfloat16)
    x[-10:] = 1.0
    ends = torch.tensor([0, rows - 10, rows], device="cuda", dtype=torch.int32)
    assert torch.equal(segment_mean(x, ends)[1], torch.ones(4096, device="cuda"))
    last = torch.arange(rows - 10, rows, device="cuda")
    w = torch.eye(4096, device="cuda", dtype=torch.bfloat16)[:128]
    assert torch.equal(packed_projection(x, w, rows=last), torch.ones(10, 128, device="cuda", dtype=torch.bfloat16))


def test_random_packs():
    for seed in range(60):
        own, other = random_lengths(seed, largest=200, most=9)
        g = torch.Generator().manual_seed(seed)
        student, teacher = torch.randn(sum(own), 72, generator=g), torch.randn(sum(other), 72, generator=g)
        options = {"pooling": ["mean", "first", "last"][seed % 3]}
        right = exact_pooled(student, teacher, cu(own), cu(other), **options)
        got = on_gpu(pooled_mse, student, teacher, cu(own), cu(other), **options)
        assert all(largest_error(got[name], value, 1e-2) <= 1e-5 for name, value in right.items())
