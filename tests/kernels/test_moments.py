"""The moment form: equal to the difference form, cacheable, and refused where it does not hold."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import TeacherMoments, linear_kl, teacher_moments, tiles

from tests.kernels.linear_kl_cases import LIMITS, check, make_case


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LINEAR_KL_CPU", tiles.CpuChunks(chunk_rows=8, block_v=100, max_buffer_mib=64))


def parts(case):
    """h_s, the heads, the teacher's states and the options without gradients on head and bias."""
    (h_s, w_s, h_t, w_t), options = case.arguments()
    options = {key: value.detach() if torch.is_tensor(value) else value for key, value in options.items()}
    return h_s, w_s.detach(), h_t, w_t, options


def moments_for(w_s, h_t, w_t, options, **extra):
    bias_t = options.get("bias_s") if w_t is None else options.get("bias_t")
    head = (w_s, None) if w_t is None else (w_t, w_s)
    tau = options.get("temperature", 1.0)
    return teacher_moments(h_t, head[0], tau, w_s=head[1], bias_t=bias_t, bias_s=options.get("bias_s"), **extra)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_matches_fp64_cached_and_not(dtype, separate, extras):
    case = make_case(dtype, separate=separate, bias=extras, rows=extras, weights=extras, temperature=1.6)
    exact = case.exact()
    h_s, w_s, h_t, w_t, options = parts(case)
    options_cached = {key: value for key, value in options.items() if key != "bias_t"}
    cached = moments_for(w_s, h_t, w_t, options)
    for call in (
        lambda: linear_kl(h_s, w_s, h_t, w_t, form="moments", per_row=True, **options),
        lambda: linear_kl(h_s, w_s, teacher=cached, per_row=True, **options_cached),
    ):
        h_s.grad = None
        total, count, values = call()
        (total * 0.5).backward()
        check(total, exact["total"], LIMITS[dtype])
        check(count, exact["count"], 1e-6)
        check(values, exact["values"], LIMITS[dtype])
        check(h_s.grad, exact["dh"], LIMITS[dtype])


def test_minus_inf_bias():
    case = make_case(bias=True)
    case.options["bias_s"][:120] = -torch.inf
    case.options["bias_s"][300] = -torch.inf
    exact = case.exact()
    h_s, w_s, h_t, w_t, options = parts(case)
    total, _ = linear_kl(h_s, w_s, teacher=moments_for(w_s, h_t, w_t, options), **options)
    (total * 0.5).backward()
    check(total, exact["total"], 1e-5)
    check(h_s.grad, exact["dh"], 1e-5)


def test_bf16_cache_costs_what_the_docstring_says():
    case = make_case(torch.float32, pairs=64, width=256, vocab=3000, noise=0.2)
    exact = case.exact()["dh"]
    h_s, w_s, h_t, w_t, options = parts(case)
    cached = moments_for(w_s, h_t, w_t, options, dtype=torch.bfloat16)
    assert cached.m.dtype == torch.bfloat16
    linear_kl(h_s, w_s, teacher=cached)[0].mul(0.5).backward()
    error = float((h_s.grad.double() - exact).norm() / exact.norm())
    assert 1e-4 < error < 1.5e-2


def test_save_load_rows_cat(tmp_path):
    case = make_case(bias=True)
    h_s, w_s, h_t, w_t, options = parts(case)
    whole = moments_for(w_s, h_t, w_t, options)
    halves = [moments_for(w_s, h_t, w_t, options, rows=torch.arange(a, b)) for a, b in ((0, 8), (8, 21))]
    joined = TeacherMoments.cat(halves)
    assert torch.equal(joined.m, whole.m)
    path = tmp_path / "moments.safetensors"
    joined.to(dtype=torch.bfloat16).save(path)
    loaded = TeacherMoments.load(path)
    assert loaded.m.dtype == torch.bfloat16
    assert (len(loaded), loaded.temperature, loaded.vocab_size) == (21, 1.0, 333)
    joined.save(path)
    loaded = TeacherMoments.load(path)
    rows = torch.tensor([4, 4, 20, 0])
    by_index = linear_kl(h_s, w_s, teacher=loaded, rows_s=rows, rows_t=rows, **options)[0]
    by_rows = linear_kl(h_s, w_s, teacher=loaded.rows(rows), rows_s=rows, **options)[0]
    direct = linear_kl(h_s, w_s, h_t, rows_s=rows, rows_t=rows, **options)[0]
    assert torch.equal(by_index, by_rows)
    torch.testing.assert_close(by_index, direct, rtol=1e-5, atol=1e-6)


def test_a_teacher_with_soft_capping_against_a_plain_student():
    case = make_case(torch.float64)
    h_s, w_s, h_t, _, _ = parts(case)
    cached = teacher_moments(h_t, w_s, softcap=3.0)
    p = torch.softmax(3 * torch.tanh(h_t @ w_s.t() / 3), -1)
    expected = (p * (p.log() - torch.log_softmax(h_s @ w_s.t(), -1))).sum()
    check(linear_kl(h_s, w_s, teacher=cached)[0], expected, 1e-11)


def test_refusals(tmp_path):
    h_s, w_s, h_t, _, _ = parts(make_case())
    cached = teacher_moments(h_t, w_s)

    def refused(message, kind=ValueError, head=w_s, **options):
        with pytest.raises(kind, match=message):
            linear_kl(h_s, head, teacher=cached, **options)

    refused("temperature is 2.0, but teacher was computed with 1.0", temperature=2.0)
    refused("computes only 'forward'", divergence="reverse")
    refused("softcap is 5.0", softcap=5.0)
    refused("needs h_t", form="difference")
    refused("replaces h_t", h_t=h_t)
    refused("frozen student head", head=w_s.clone().requires_grad_())
    refused("teacher has 21 rows for 1 pairs", rows_s=torch.tensor([0]))
    refused("rows_t holds 21", IndexError, rows_s=torch.tensor([0]), rows_t=torch.tensor([21]))
    refused("w_s has 300 vocabulary rows but teacher has 333", head=w_s[:300])
    with pytest.raises(ValueError, match="differ in temperature"):
        TeacherMoments.cat([cached, teacher_moments(h_t, w_s, 2.0)])
    with pytest.raises(ValueError, match="parts is empty"):
        TeacherMoments.cat([])
    with pytest.raises(ValueError, match="entropy must have shape"):
        TeacherMoments(cached.m, cached.entropy[:3], cached.bias_mean, 1.0, 333)
    from safetensors.torch import save_file

    save_file({"m": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a TeacherMoments file"):
        TeacherMoments.load(tmp_path / "other.safetensors")


def test_nan_is_not_hidden():
    h_s, w_s, h_t, _, _ = parts(make_case())
    h_t[3, 3] = torch.nan
    cached = teacher_moments(h_t, w_s)
    assert linear_kl(h_s, w_s, teacher=cached)[0].isnan()
    good = linear_kl(h_s, w_s, teacher=cached, row_weight=torch.arange(21) != 3)[0]
    assert good.isfinite()
