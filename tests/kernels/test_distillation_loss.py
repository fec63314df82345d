"""distillation_loss: each term and each gradient is that of the op by itself."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import distillation_loss, linear_kl, paired_mse, pooled_mse, teacher_moments

from tests.kernels.hidden_cases import pairs, states
from tests.kernels.linear_kl_cases import check

WEIGHTS = {"pooled_mse": 0.3, "paired_mse": 0.5, "kl": 0.7}


def problem(dtype=torch.float64, trained_head=False):
    student, teacher, *bounds = states("edges", width=16, dtype=dtype)
    rows_s, rows_t, weight = pairs(student, teacher, 40)
    g = torch.Generator().manual_seed(5)
    head, bias = (
        torch.randn(*shape, generator=g).to(dtype).requires_grad_(trained_head) for shape in ((50, 16), (50,))
    )
    return student.requires_grad_(), teacher, bounds, (rows_s, rows_t, weight), head, bias


def separate(student, teacher, bounds, selection, head, bias):
    rows_s, rows_t, weight = selection
    return {
        "pooled_mse": pooled_mse(student, teacher, *bounds),
        "paired_mse": paired_mse(student, teacher, rows_s, rows_t, weight=weight),
        "kl": linear_kl(
            student, head, teacher, bias_s=bias, rows_s=rows_s, rows_t=rows_t, row_weight=weight, temperature=2.0
        ),
    }


def together(student, teacher, bounds, selection, head, bias, terms=tuple(WEIGHTS)):
    rows_s, rows_t, weight = selection
    found = distillation_loss(
        student, teacher, pooled="pooled_mse" in terms, cu_seqlens_s=bounds[0], cu_seqlens_t=bounds[1],
        paired="paired_mse" in terms, rows_s=rows_s, rows_t=rows_t, pair_weight=weight,
        head=head if "kl" in terms else None, head_bias=bias if "kl" in terms else None, temperature=2.0,
    )  # fmt: skip
    return {name: term for name, term in found._asdict().items() if term is not None}


def gradients(terms, leaves):
    total = sum(WEIGHTS[name] * value for name, (value, _) in terms.items())
    return torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_separate_terms(trained_head, dtype):
    case = problem(dtype, trained_head)
    leaves = [case[0], *(case[4:] if trained_head else ())]
    apart, joint = separate(*case), together(*case)
    assert apart.keys() == joint.keys()
    for name in apart:
        assert torch.equal(apart[name][0], joint[name][0])
        assert torch.equal(apart[name][1].to(joint[name][1]), joint[name][1])
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    for a, b in zip(gradients(apart, leaves), gradients(joint, leaves)):
        check(b, a, limit)


@pytest.mark.parametrize("terms", [("pooled_mse",), ("paired_mse",), ("kl",), ("pooled_mse", "kl")])
def test_any_subset_of_terms(terms):
    case = problem()
    joint = together(*case, terms=terms)
    apart = {name: value for name, value in separate(*case).items() if name in terms}
    assert set(joint) == set(terms)
    check(gradients(joint, [case[0]])[0], gradients(apart, [case[0]])[0], 1e-12)


def test_one_node_and_gradients_of_single_terms():
    case = problem()
    joint = together(*case)
    nodes = {value.grad_fn for value, _ in joint.values()}
    assert len(nodes) == 1
    for name, (value, _) in separate(*case).items():
        (right,) = torch.autograd.grad(value, case[0])
        check(torch.autograd.grad(joint[name][0], case[0], retain_graph=True)[0], right, 1e-12)


@pytest.mark.parametrize(("divergence", "beta"), [("reverse", 0.5), ("jsd", 0.3), ("jsd", 0.0), ("jsd", 1)])
def test_divergences(divergence, beta):
    student, teacher, bounds, (rows_s, rows_t, weight), head, bias = problem()
    shared = {"rows_s": rows_s, "rows_t": rows_t, "divergence": divergence, "beta": beta, "softcap": 3.0}
    joint = distillation_loss(
        student, teacher, cu_seqlens_s=bounds[0], cu_seqlens_t=bounds[1], pair_weight=weight, head=head, head_bias=bias,
        **shared,
    )  # fmt: skip
    apart, _ = linear_kl(student, head, teacher, bias_s=bias, row_weight=weight, **shared)
    assert torch.equal(joint.kl[0], apart)
    (got,), (right,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (joint.kl[0], apart))
    check(got, right, 1e-12)
    if beta:
        shared["divergence"] = "forward"
        other, _ = linear_kl(student, head, teacher, bias_s=bias, row_weight=weight, **shared)
        assert abs(float((other / apart).detach()) - 1) > 0.01, "the control: the forward KL is another number"


def test_moments():
    student, teacher, bounds, (rows_s, rows_t, weight), head, bias = problem()
    cached = teacher_moments(teacher, head, 2.0, bias_t=bias, rows=rows_t)
    terms = distillation_loss(
        student, teacher, cu_seqlens_s=bounds[0], cu_seqlens_t=bounds[1], rows_s=rows_s, rows_t=torch.arange(40),
        pair_weight=weight, head=head, head_bias=bias, moments=cached, temperature=2.0,
    )  # fmt: skip
    (got,) = torch.autograd.grad(terms.pooled_mse[0] + terms.kl[0], student)
    apart = separate(*problem()[:0], student, teacher, bounds, (rows_s, rows_t, weight), head, bias)
    (right,) = torch.autograd.grad(apart["pooled_mse"][0] + apart["kl"][0], student)
    check(terms.kl[0], apart["kl"][0], 1e-10)
    check(got, right, 1e-10)


def test_no_gradient_wanted():
    student, *rest = problem()
    with torch.no_grad():
        assert not together(student, *rest)["kl"][0].requires_grad
    assert not together(student.detach(), *rest)["kl"][0].requires_grad


def test_bad_input():
    student, teacher, bounds, (rows_s, rows_t, _), head, _ = problem()
    ends = {"cu_seqlens_s": bounds[0], "cu_seqlens_t": bounds[1]}
    with pytest.raises(ValueError, match="there is no term"):
        distillation_loss(student, teacher, pooled=False)
    with pytest.raises(ValueError, match="cu_seqlens_s and cu_seqlens_t are needed"):
        distillation_loss(student, teacher)
    with pytest.raises(ValueError, match="rows_s and rows_t are needed"):
        distillation_loss(student, teacher, **ends, paired=True)
    with pytest.raises(TypeError, match="paired is 'cosine', but must be True or False"):
        distillation_loss(student, teacher, **ends, paired="cosine", rows_s=rows_s, rows_t=rows_t)
    with pytest.raises(ValueError, match="head is 15 wide"):
        distillation_loss(student, teacher, **ends, rows_s=rows_s, rows_t=rows_t, head=head[:, :15])
    cached = teacher_moments(teacher, head, rows=rows_t)
    options = {"rows_s": rows_s, "rows_t": rows_t, "head": head, "moments": cached}
    with pytest.raises(ValueError, match="with moments rows_t holds rows of the moments"):
        distillation_loss(student, teacher, **ends, paired=True, **options)
    with pytest.raises(ValueError, match="divergence is 'reverse', but the moment form"):
        distillation_loss(student, teacher, **ends, divergence="reverse", **options)
    with pytest.raises(ValueError, match="divergence is 'kl', but must be one of"):
        distillation_loss(student, teacher, **ends, divergence="kl", **options)
    with pytest.raises(ValueError, match="temperature is 3"):
        distillation_loss(student, teacher, **ends, temperature=3.0, **options)
    with pytest.raises(ValueError, match="moments is given, but head is None"):
        distillation_loss(student, teacher, **ends, moments=cached)
