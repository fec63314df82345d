"""Inputs on which a wrong kernel is right everywhere else: each test is there for a fault that passed all others."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import (
    TeacherMoments,
    distillation_loss,
    linear_kl,
    packed_projection,
    paired_mse,
    pooled_mse,
    segment_mean,
    teacher_moments,
    tiles,
)
from mtllm_fast.kernels import hidden_mse_ops as hidden
from mtllm_fast.kernels import linear_kl_ops as kl
from mtllm_fast.kernels.distillation_loss import _distillation
from mtllm_fast.kernels.linear_kl import reference as linear_kl_reference
from torch import Tensor

from tests.kernels.hidden_cases import check_all, cu, exact_paired, exact_pooled, pairs, run_loss, states
from tests.kernels.linear_kl_cases import Case, check, make_case, same_as_fake
from tests.kernels.projection_cases import exact as exact_projection
from tests.kernels.projection_cases import make, run


# ---- hidden_mse
@pytest.mark.parametrize("incoming", [0.3, -2.0])
def test_pooled_under_an_incoming_gradient(incoming):
    case = states("tiny")
    x = case[0].clone().requires_grad_()
    (pooled_mse(x, *case[1:])[0] * incoming).backward()
    check(x.grad, incoming * exact_pooled(*case)["dx"], 1e-5)


def test_negative_weights():
    student, teacher, *bounds = states("tiny")
    weight = torch.linspace(-1, 2, 32)
    rows_s, rows_t, _ = pairs(student, teacher, 32)
    for loss, right, others in ((pooled_mse, exact_pooled, bounds), (paired_mse, exact_paired, (rows_s, rows_t))):
        exact = right(student, teacher, *others, weight=weight) | {"count": weight.double().sum()}
        check_all(run_loss(loss, student, teacher, *others, weight=weight), exact, torch.float32)


def test_negative_weights_of_the_kl():
    case = make_case(bias=True, rows=True, row_weight=torch.linspace(-1, 2, 21))
    got, exact = case.run(linear_kl, per_row=True), case.exact()
    for key, value in exact.items():
        check(got[key], value, 1e-5)


def test_the_count_of_spans_that_are_empty_on_one_side():
    student, teacher, *_ = states("edges")
    own, other = torch.tensor([[0, 2], [5, 5], [7, 9], [3, 4]]), torch.tensor([[0, 2], [5, 6], [8, 8], [2, 5]])
    total, count = pooled_mse(student, teacher, spans_s=own, spans_t=other)
    assert count == 2
    right = sum(
        (student[a:b].mean(0) - teacher[c:d].mean(0)).double().square().mean()
        for (a, b), (c, d) in ((own[i].tolist(), other[i].tolist()) for i in (0, 3))
    )
    check(total, right, 1e-5)
    weights = torch.tensor([2.0, 64.0, 128.0, 0.5])
    assert pooled_mse(student, teacher, spans_s=own, spans_t=other, weight=weights)[1] == 2.5


@pytest.mark.parametrize("with_more", [False, True])
def test_pairs_behind_the_first_block_of_rows(with_more):
    """At a width of 2048 a block of the CPU's gradient is 128 rows."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(300, 2048, generator=g), torch.randn(10, 2048, generator=g)
    rows_s, rows_t = torch.tensor([290, 3, 127, 128, 129, 290, 256]), torch.tensor([0, 1, 2, 3, 4, 5, 6])
    exact = exact_paired(student, teacher, rows_s, rows_t, None)["dx"]
    x = student.clone().requires_grad_()
    if with_more:
        bounds = cu([200, 100]), cu([4, 6])
        exact = exact + exact_pooled(student, teacher, *bounds)["dx"]
        terms = distillation_loss(
            x, teacher, cu_seqlens_s=bounds[0], cu_seqlens_t=bounds[1], paired=True, rows_s=rows_s, rows_t=rows_t
        )
        (terms.pooled_mse[0] + terms.paired_mse[0]).backward()
    else:
        paired_mse(x, teacher, rows_s, rows_t)[0].backward()
    check(x.grad, exact, 1e-5)


def test_every_term_has_a_weight_of_its_own():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(20, 16, generator=g), torch.randn(14, 16, generator=g)
    rows_s, rows_t, head = torch.tensor([0, 7, 19, 4]), torch.tensor([13, 2, 5, 5]), torch.randn(30, 16, generator=g)
    bounds = cu([9, 11]), cu([6, 8])
    x = student.clone().requires_grad_()
    ends = {"cu_seqlens_s": bounds[0], "cu_seqlens_t": bounds[1]}
    terms = distillation_loss(x, teacher, **ends, paired=True, rows_s=rows_s, rows_t=rows_t, head=head)
    (0.3 * terms.pooled_mse[0] + 0.5 * terms.paired_mse[0] + 0.7 * terms.kl[0]).backward()
    pairs = student[rows_s].double().requires_grad_()
    linear_kl_reference(pairs, head.double(), teacher[rows_t].double(), head.double())[0].backward()
    exact = 0.3 * exact_pooled(student, teacher, *bounds)["dx"]
    exact += 0.5 * exact_paired(student, teacher, rows_s, rows_t, None)["dx"]
    exact.index_add_(0, rows_s, 0.7 * pairs.grad)
    check(x.grad, exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_segment_over_several_blocks_of_rows(dtype):
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, 2048, generator=g).to(dtype) for n in (300, 290))
    bounds = cu([140, 0, 100, 60]), cu([5, 3, 135, 147])
    case = student, teacher, *bounds
    check_all(run_loss(pooled_mse, *case), exact_pooled(*case), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_eps_where_it_matters(norm, dtype):
    """States as small as its root."""
    case = make(dtype=dtype, norm=norm, eps=1e-3)
    case["x"] *= 0.02
    got, right = run(packed_projection, case), exact_projection(case)
    for name in ("y", "d_x", "d_weight", "d_norm_weight"):
        check(got[name], right[name], 1e-5)
    other = exact_projection({**case, "eps": 1e-6})["y"]
    assert float((other - right["y"]).abs().max()) > 0.1, "the control: another eps is another value"


def test_bounds_of_int64_and_a_tail_that_belongs_to_nobody():
    student, teacher, *bounds = states("one", tail=7)
    dx = run_loss(pooled_mse, student, teacher, *(b.long() for b in bounds))["dx"]
    check(dx, exact_pooled(student, teacher, *bounds)["dx"], 1e-5)
    assert not dx[5:].any()


# ---- linear_kl
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("trained", ["h_s", "w_s", "bias_s"])
def test_one_gradient_alone(trained, divergence):
    case = make_case(bias=True, rows=True, weights=True, divergence=divergence, temperature=1.7)
    exact = case.exact()
    (h_s, w_s, h_t, _), options = case.arguments()
    leaves = {"h_s": h_s, "w_s": w_s, "bias_s": options["bias_s"]}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    (linear_kl(h_s, w_s, h_t, **options)[0] * 0.5).backward()
    check(leaves[trained].grad, exact[{"h_s": "dh", "w_s": "dw", "bias_s": "db"}[trained]], 1e-5)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != trained)


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
@pytest.mark.parametrize("gone", [[3, 200], list(range(120))])
@pytest.mark.parametrize("student_bias", [True, False])
def test_minus_inf_in_the_teachers_bias_alone(gone, divergence, student_bias, monkeypatch):
    """Entries that the teacher never says and the student may: by hand, over the entries that it does say."""
    monkeypatch.setattr(tiles, "LINEAR_KL_CPU", tiles.CpuChunks(chunk_rows=8, block_v=100, max_buffer_mib=64))
    case = make_case(separate=True, bias=True, divergence=divergence, beta=0.3)
    if not student_bias:
        case.options["bias_s"] = None
    own_bias = torch.zeros(333) if case.options["bias_s"] is None else case.options["bias_s"]
    case.options["bias_t"][gone] = -torch.inf
    kept = torch.ones(333, dtype=torch.bool)
    kept[gone] = False
    h, w, b = (x.double().requires_grad_() for x in (case.h_s, case.w_s, own_bias))
    log_s = (h @ w.T + b).log_softmax(-1)
    log_t = (case.h_t @ case.w_t.T + case.options["bias_t"]).double()[:, kept].log_softmax(-1)
    if divergence == "forward":
        total = (log_t.exp() * (log_t - log_s[:, kept])).sum()
    else:
        mixture = (0.7 * log_s.exp()).index_add(1, kept.nonzero().squeeze(1), 0.3 * log_t.exp())
        total = 0.3 * (log_t.exp() * (log_t - mixture.log()[:, kept])).sum()
        total = total + 0.7 * (log_s.exp() * (log_s - mixture.log())).sum()
    (total * 0.5).backward()
    (x, head, h_t, w_t), options = case.arguments()
    got, _ = linear_kl(x, head, h_t, w_t, **options)
    (got * 0.5).backward()
    check(got, total, 1e-5)
    check(x.grad, h.grad, 1e-5)
    check(head.grad, w.grad, 1e-5)
    if student_bias:
        check(options["bias_s"].grad, b.grad, 1e-5)
    if divergence == "forward":
        cached = teacher_moments(
            case.h_t, case.w_t, w_s=case.w_s, bias_t=case.options["bias_t"], bias_s=case.options["bias_s"]
        )
        x = case.h_s.clone().requires_grad_()
        value, _ = linear_kl(x, case.w_s, teacher=cached, bias_s=case.options["bias_s"])
        (value * 0.5).backward()
        check(value, total, 1e-5)
        check(x.grad, h.grad, 1e-5)


@pytest.mark.parametrize(("v_s", "v_t"), [(340, 350), (350, 340), (330, 350), (350, 330)])
def test_heads_of_unequal_size_in_the_moment_form(v_s, v_t):
    case = make_case(separate=True, bias=True, vocab=350, temperature=1.6)
    case.w_s, case.options["bias_s"] = case.w_s[:v_s], case.options["bias_s"][:v_s]
    case.w_t, case.options["bias_t"] = case.w_t[:v_t], case.options["bias_t"][:v_t]
    case.options["vocab_size"] = 330
    exact = case.exact()
    bias_s, bias_t = case.options["bias_s"], case.options["bias_t"]
    cached = teacher_moments(case.h_t, case.w_t, 1.6, w_s=case.w_s, bias_t=bias_t, bias_s=bias_s, vocab_size=330)
    options = {"bias_s": bias_s, "temperature": 1.6, "vocab_size": 330}
    for call in (
        lambda x: linear_kl(x, case.w_s, teacher=cached, **options),
        lambda x: linear_kl(x, case.w_s, case.h_t, case.w_t, bias_t=bias_t, form="moments", **options),
    ):
        x = case.h_s.clone().requires_grad_()
        total, _ = call(x)
        (total * 0.5).backward()
        check(total, exact["total"], 1e-5)
        check(x.grad, exact["dh"], 1e-5)
    with pytest.raises(ValueError, match=f"vocab_size is {max(v_s, v_t)}, but must be between 1 and {min(v_s, v_t)}"):
        linear_kl(case.h_s, case.w_s, case.h_t, case.w_t, vocab_size=max(v_s, v_t))
    with pytest.raises(ValueError, match="vocab_size is 329, but teacher was computed over 330 entries"):
        linear_kl(case.h_s, case.w_s, teacher=cached, **{**options, "vocab_size": 329})


def test_a_cache_keeps_its_temperature(tmp_path):
    case = make_case(temperature=1.6)
    exact = case.exact()
    made = teacher_moments(case.h_t, case.w_s, 1.6)
    made.save(tmp_path / "cache.safetensors")
    halves = made.rows(torch.arange(9)), made.rows(torch.arange(9, 21))
    for cached in (
        made,
        TeacherMoments.load(tmp_path / "cache.safetensors"),
        TeacherMoments.cat(halves),
        made.to("cpu"),
    ):
        assert cached.temperature == 1.6
        x = case.h_s.clone().requires_grad_()
        total, _ = linear_kl(x, case.w_s, teacher=cached, temperature=1.6)
        (total * 0.5).backward()
        check(total, exact["total"], 1e-5)
        check(x.grad, exact["dh"], 1e-5)
        with pytest.raises(ValueError, match=r"temperature is 1.0, but teacher was computed with 1\.6"):
            linear_kl(case.h_s, case.w_s, teacher=cached)


def test_a_shared_head_shares_its_bias_in_the_cache():
    case = make_case(bias=True)
    bias, exact = case.options["bias_s"], case.exact()
    cached = teacher_moments(case.h_t, case.w_s, bias_t=bias)
    check(linear_kl(case.h_s, case.w_s, teacher=cached, bias_s=bias)[0], exact["total"], 1e-5)


def test_caches_that_do_not_belong_together():
    case = make_case()
    cached = teacher_moments(case.h_t, case.w_s)
    with pytest.raises(ValueError, match=r"differ in vocab_size: \[330, 333\]"):
        TeacherMoments.cat([cached, teacher_moments(case.h_t, case.w_s, vocab_size=330)])
    with pytest.raises(ValueError, match=r"differ in temperature: \[1.0, 1.5\]"):
        TeacherMoments.cat([cached, teacher_moments(case.h_t, case.w_s, 1.5)])


# ---- packed_projection
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_a_scale_without_boundary_rows(norm):
    case = make(norm=norm, scale=1.7, padded=False)
    got, right = run(packed_projection, case), exact_projection(case)
    for name, value in right.items():
        check(got[name], value, 1e-5)


# ---- all ops
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_fakes_in_every_dtype(dtype):
    """opcheck compares them in fp32, where a gradient's dtype and the sums' are one."""
    case = make_case(dtype, pairs=5, width=8, vocab=19, separate=True, bias=True, rows=True)
    o = case.options
    rows = (o["rows_s"], o["rows_t"], None, -1)
    tensors = (case.h_s, case.w_s, case.h_t, case.w_t, o["bias_s"], o["bias_t"])
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        same_as_fake(kl.difference.op, (*tensors, *rows, 2.0, 4.0, 0.0, "forward", 0.5, *need))
    teacher = (case.h_t, case.w_t, case.w_s, o["bias_t"], o["bias_s"], o["rows_t"], 2.0, 0.0)
    same_as_fake(kl.moments_of.op, teacher)
    cached = kl.moments_of.op(*teacher)
    for need in (True, False):
        same_as_fake(
            kl.moment_step.op, (case.h_s, case.w_s, o["bias_s"], *cached, o["rows_s"], None, None, -1, 2.0, 4.0, need)
        )
    student, teacher_states, *bounds = states("tiny", width=8, dtype=dtype)
    rows_s, rows_t, weight = pairs(student, teacher_states, 9)
    same_as_fake(hidden.segment_mean.op, (student, bounds[0], "mean"))
    paired = (rows_s, rows_t, weight, False)
    for need in (True, False):
        pooled = (*bounds, "mean", torch.ones(32))
        same_as_fake(hidden.hidden_loss.op, (student, teacher_states, *pooled, *paired, need))
        head, bias = torch.randn(20, 8).to(dtype), torch.randn(20).to(dtype)
        for has_pairs in (False, True):
            same_as_fake(
                _distillation.op,
                (student, teacher_states, *bounds, "mean", None, rows_s, rows_t, weight, has_pairs, False, head, bias, None,
                 None, None, -1, 2.0, 4.0, 0.0, "jsd", 0.3, need, need, need),
            )  # fmt: skip


@pytest.mark.parametrize("trained", ["head", "bias"])
def test_the_joint_loss_with_one_of_its_parameters_trained(trained):
    case = make_case(bias=True, temperature=2.0, softcap=3.0)
    rows = torch.arange(21)
    exact = case.exact()
    head, bias = (
        x.clone().requires_grad_(name == trained) for name, x in (("head", case.w_s), ("bias", case.options["bias_s"]))
    )
    terms = distillation_loss(
        case.h_s, case.h_t, pooled=False, rows_s=rows, rows_t=rows, head=head, head_bias=bias, temperature=2.0,
        softcap=3.0,
    )  # fmt: skip
    (terms.kl[0] * 0.5).backward()
    check((head if trained == "head" else bias).grad, exact["dw" if trained == "head" else "db"], 1e-5)
    assert (bias if trained == "head" else head).grad is None


def test_views_of_every_argument():
    """Rows and columns taken out of larger tensors, NaN everywhere else."""

    def view(x: Tensor) -> Tensor:
        wide = x.new_full((2 * x.shape[0], *(n + 3 for n in x.shape[1:])), torch.nan)
        part = wide[::2] if x.dim() == 1 else wide[::2, 1:-2]
        return part.copy_(x)

    case = make_case(bias=True, separate=True, row_weight=torch.linspace(0.1, 1, 21))
    options = {key: view(value) for key, value in case.options.items()}
    viewed = Case(*(view(x) for x in (case.h_s, case.w_s, case.h_t, case.w_t)), options)
    assert not viewed.h_s.is_contiguous()
    x, w, b = (t.requires_grad_() for t in (viewed.h_s.detach(), viewed.w_s.detach(), options["bias_s"].detach()))
    (linear_kl(x, w, viewed.h_t, viewed.w_t, **{**options, "bias_s": b})[0] * 0.5).backward()
    exact = case.exact()
    for got, key in ((x.grad, "dh"), (w.grad, "dw"), (b.grad, "db")):
        check(got, exact[key], 1e-5)
    student, teacher, *bounds = states("tiny")
    leaf = view(student).requires_grad_()
    pooled_mse(leaf, view(teacher), *bounds)[0].backward()
    check(leaf.grad, exact_pooled(student, teacher, *bounds)["dx"], 1e-5)
    check(segment_mean(view(student), bounds[0]), segment_mean(student, bounds[0]), 1e-6)
    made = make(norm="layer", padded=False)
    got = packed_projection(**{key: view(v) if isinstance(v, Tensor) else v for key, v in made.items()})
    check(got, exact_projection(made)["y"], 1e-5)
