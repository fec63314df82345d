"""segment_mean, pooled_mse and paired_mse on the CPU against fp64, over lengths, poolings and dtypes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mtllm_fast.kernels import paired_mse, pooled_mse, segment_mean
from mtllm_fast.kernels.hidden_mse import reference_mean, reference_pooled

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
from tests.kernels.linear_kl_cases import LIMITS, check, error, largest_error, same_bits

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


run_pooled, run_paired = partial(run_loss, pooled_mse), partial(run_loss, paired_mse)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled(lengths, dtype):
    case = states(lengths, dtype=dtype)
    check_all(run_pooled(*case), exact_pooled(*case), dtype)


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_poolings(pooling):
    student, teacher, *bounds = states("edges")
    options = {"pooling": pooling, "weight": torch.rand(7)}
    got, exact = (f(student, teacher, *bounds, **options) for f in (run_pooled, exact_pooled))
    check_all(got, exact, torch.float32)


def test_weighted_spans():
    """Choices of a text: (B, C) spans in any order, weights per choice, empty ones among them."""
    student, teacher, *_ = states("edges")
    own = torch.tensor([[[70, 90], [60, 64]], [[0, 5], [8, 8]], [[91, 130], [131, 132]]])
    other = torch.tensor([[[10, 12], [60, 64]], [[0, 5], [8, 9]], [[91, 130], [131, 132]]])
    weight = torch.tensor([[1.0, 0.5], [0.0, 1.0], [2.0, 0.25]])
    got = run_pooled(student, teacher, spans_s=own, spans_t=other, weight=weight)
    flat = {"pooling": "spans", "weight": weight.flatten()}
    check_all(got, exact_pooled(student, teacher, own.view(-1, 2), other.view(-1, 2), **flat), torch.float32)
    assert got["count"] == 1.0 + 0.5 + 2.0 + 0.25  # (1, 1) is empty in the student


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_segment_mean(pooling):
    student, _, bounds, _ = states("edges")
    x, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    got = segment_mean(x, bounds, pooling=pooling)
    exact = reference_mean(wide, bounds, pooling)
    check(got, exact, 1e-5)
    assert not got[0].any()
    direction = torch.randn(got.shape)
    (got * direction).sum().backward()
    (exact * direction).sum().backward()
    check(x.grad, wide.grad, 1e-5)


def test_segment_mean_of_spans():
    student, *_ = states("edges")
    spans = torch.tensor([[[4, 9], [0, 2]]])
    got = segment_mean(student, spans=spans)
    assert got.shape == (1, 2, 24)
    check(got[0], torch.stack([student[4:9].mean(0), student[0:2].mean(0)]), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 400])
def test_paired(dtype, count):
    student, teacher, *_ = states("edges", dtype=dtype)
    rows_s, rows_t, weight = pairs(student, teacher, count, zeros=count > 1)
    exact = exact_paired(student, teacher, rows_s, rows_t, weight)
    check_all(run_paired(student, teacher, rows_s, rows_t, weight=weight), exact, dtype)
    order = torch.argsort(rows_s, stable=True)
    ordered = run_paired(student, teacher, rows_s[order], rows_t[order], weight=weight[order], rows_sorted=True)
    check_all(ordered, exact, dtype)


def test_no_worse_than_eager_in_the_same_precision():
    """bf16: the error of the gradient is that of rounding it; eager takes means in bf16 and loses more."""
    student, teacher, *bounds = states("dominant", dtype=torch.bfloat16)
    exact = exact_pooled(student, teacher, *bounds)
    x = student.clone().requires_grad_()
    eager = reference_pooled(x, teacher, *bounds)
    eager.backward()
    got = run_pooled(student, teacher, *bounds)
    assert error(got["dx"], exact["dx"]) <= error(x.grad, exact["dx"])
    assert error(got["total"], exact["total"]) <= error(eager, exact["total"])


def test_empty_segments_count_nothing_and_pool_to_zero():
    student, teacher, *bounds = states("edges")
    _, count = pooled_mse(student, teacher, *bounds)
    assert count == 4  # three of seven are empty on one side or both
    assert not segment_mean(student, bounds[0])[0].any()
    none = cu([0, 0])
    got = run_pooled(student, teacher, none, none)
    assert got["count"] == got["total"] == 0
    assert not got["dx"].any()


def test_all_masked():
    student, teacher, *bounds = states("edges")
    for bad in (0.0, torch.nan):
        student[1:30] = bad
        got = run_pooled(student, teacher, *bounds, weight=torch.zeros(7))
        assert got["count"] == got["total"] == 0
        assert not got["dx"].any()
        rows = torch.arange(5)
        got = run_paired(student, teacher, rows, rows, weight=torch.zeros(5))
        assert got["count"] == got["total"] == 0
        assert not got["dx"].any()
    nothing = torch.zeros(0, dtype=torch.long)
    got = run_paired(student, teacher, nothing, nothing)
    assert got["total"] == 0
    assert not got["dx"].any()


def test_nan_of_a_counted_row_is_not_hidden():
    student, teacher, *bounds = states("edges")
    student[4, 0] = torch.nan
    assert run_pooled(student, teacher, *bounds)["total"].isnan()
    assert run_paired(student, teacher, torch.tensor([4]), torch.tensor([0]))["total"].isnan()


def test_gradcheck_in_fp64():
    student, teacher, *bounds = states("one", width=5, dtype=torch.float64)
    x = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pooled_mse(x, teacher, *bounds)[0], (x,))
    rows = torch.tensor([0, 3, 3]), torch.tensor([8, 1, 0])
    assert torch.autograd.gradcheck(lambda x: paired_mse(x, teacher, *rows)[0], (x,))


def test_bitwise_repeatable_and_independent_of_what_empty_holds():
    student, teacher, *bounds = states("dominant", dtype=torch.bfloat16)
    rows_s, rows_t, weight = pairs(student, teacher, 90)

    same_bits(lambda: run_pooled(student, teacher, *bounds))
    same_bits(lambda: run_paired(student, teacher, rows_s, rows_t, weight=weight))


@pytest.mark.parametrize("part", range(5))
def test_random_packs(part):
    """Property: on 500 random packs the sums, counts and gradients are the reference's."""
    worst = 0.0
    for seed in range(part * 100, part * 100 + 100):
        g = torch.Generator().manual_seed(seed)
        own, other = random_lengths(seed)
        width = int(torch.randint(1, 9, (1,), generator=g))
        student = torch.randn(sum(own), width, generator=g, dtype=torch.float64)
        teacher = torch.randn(sum(other), width, generator=g, dtype=torch.float64)
        weight = torch.rand(len(own), generator=g, dtype=torch.float64)
        options = {"pooling": ["mean", "first", "last"][seed % 7 % 3], "weight": weight}
        got = run_pooled(student, teacher, cu(own), cu(other), **options)
        exact = exact_pooled(student, teacher, cu(own), cu(other), **options)
        valid = torch.tensor([a > 0 and b > 0 for a, b in zip(own, other)])
        assert torch.isclose(got["count"], weight[valid].sum())
        worst = max(worst, *(largest_error(got[name], value) for name, value in exact.items()))
        if student.shape[0] and teacher.shape[0]:
            rows_s, rows_t, w = pairs(student, teacher, 1 + seed % 9, seed)
            got = run_paired(student, teacher, rows_s, rows_t, weight=w)
            exact = exact_paired(student, teacher, rows_s, rows_t, w)
            worst = max(worst, largest_error(got["dx"], exact["dx"]))
    assert worst < 1e-9


BAD = {
    "cu_seqlens must start at 0": {"cu_seqlens_s": torch.tensor([1, 4, 8], dtype=torch.int32)},
    "cu_seqlens must not descend": {"cu_seqlens_s": torch.tensor([0, 6, 4], dtype=torch.int32)},
    "cu_seqlens ends at 99, but there are 8 rows": {"cu_seqlens_s": torch.tensor([0, 6, 99], dtype=torch.int32)},
    "cu_seqlens_s must be int32 or int64": {"cu_seqlens_s": torch.tensor([0.0, 6, 8])},
    "cu_seqlens_t is on meta, but teacher is on cpu": {
        "cu_seqlens_t": torch.zeros(3, dtype=torch.int32, device="meta")
    },
    "cu_seqlens_t must have shape": {"cu_seqlens_t": torch.zeros(2, 2, dtype=torch.int32)},
    r"cu_seqlens_s is \(3,\) but cu_seqlens_t is \(4,\)": {"cu_seqlens_t": torch.tensor([0, 1, 2, 3])},
    "pooling is 'max'": {"pooling": "max"},
    r"weight must have shape \(2,\)": {"weight": torch.ones(3)},
    "student is 4 wide but teacher is 5 wide": {"teacher": torch.randn(8, 5)},
    "student is torch.float32 but teacher is torch.float64": {"teacher": torch.randn(8, 4, dtype=torch.float64)},
    "student must be floating point": {"student": torch.ones(8, 4, dtype=torch.int64)},
    r"student must have shape \(rows, width\)": {"student": torch.randn(2, 4, 4)},
    "spans_s and spans_t belong together": {"spans_s": torch.tensor([[0, 1]])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_of_pooled(message):
    arguments = {
        "student": torch.randn(8, 4),
        "teacher": torch.randn(8, 4),
        "cu_seqlens_s": torch.tensor([0, 3, 8], dtype=torch.int32),
        "cu_seqlens_t": torch.tensor([0, 5, 8], dtype=torch.int32),
        **BAD[message],
    }
    with pytest.raises((ValueError, TypeError), match=message):
        pooled_mse(**arguments)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 4], [3, 5]], "spans.0. and spans.1. overlap at row 3"),
        ([[2, 9]], "spans.0. is rows 2 to 9"),
        ([[4, 2]], "spans.0. is rows 4 to 2"),
        ([[-1, 2]], "spans.0. is rows -1 to 2"),
    ],
)
def test_bad_spans(spans, message):
    with pytest.raises(ValueError, match=message):
        segment_mean(torch.randn(8, 4), spans=torch.tensor(spans))


def test_bad_input_of_paired():
    x, rows = torch.randn(8, 4), torch.arange(3)
    for bad, message in ((8, "rows_s holds 8"), (-1, "rows_s holds -1")):
        with pytest.raises(IndexError, match=message):
            paired_mse(x, x, torch.tensor([0, bad, 1]), rows)
    with pytest.raises(ValueError, match="rows_t must have shape"):
        paired_mse(x, x, rows, rows[:2])
    with pytest.raises(TypeError, match="rows_s must hold int32 or int64"):
        paired_mse(x, x, rows.float(), rows)
    student = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="rows_s must ascend"):
        paired_mse(student, x, rows.flip(0), rows, rows_sorted=True)[0].backward()


def test_gradient_limits_have_a_negative_control():
    """The limits reject a gradient that forgets the length of a segment."""
    student, teacher, *bounds = states("edges")
    exact = exact_pooled(student, teacher, *bounds)["dx"]
    wrong = exact.clone()
    wrong[1:64] *= 63 / 64
    assert error(wrong, exact) > LIMITS[torch.float32]
