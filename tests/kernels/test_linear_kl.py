"""linear_kl on the CPU against fp64: values, every gradient, every option; what must be 0, NaN or an error."""

from __future__ import annotations

import itertools

import pytest
import torch
from mtllm_fast.kernels import LinearKL, gemms, linear_kl, linear_kl_cpu, tiles
from mtllm_fast.kernels.linear_kl import reference

from tests.kernels.linear_kl_cases import LIMITS, check, make_case, same_bits, with_gone

FLAGS = ("separate", "bias", "rows", "weights")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and several vocabulary blocks, the last ones partial."""
    monkeypatch.setattr(tiles, "LINEAR_KL_CPU", tiles.CpuChunks(chunk_rows=8, block_v=100, max_buffer_mib=64))


def compare(case, limit: float, **extra) -> None:
    got, exact = case.run(linear_kl, per_row=True, **extra), case.exact()
    assert got.keys() == exact.keys()
    for key, value in exact.items():
        check(got[key], value, limit)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("flags", itertools.product((False, True), repeat=4))
def test_matches_fp64(small_blocks, divergence, flags):
    case = make_case(**dict(zip(FLAGS, flags)), divergence=divergence, beta=0.3, temperature=1.7)
    compare(case, LIMITS[torch.float32])


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(small_blocks, divergence, dtype):
    compare(make_case(dtype, bias=True, divergence=divergence), LIMITS[dtype])


@pytest.mark.parametrize("fast", [False, True])
def test_bf16_with_and_without_a_bf16_gemm(small_blocks, monkeypatch, fast):
    monkeypatch.setattr(linear_kl_cpu, "has_fast_bf16", lambda: fast)
    compare(make_case(torch.bfloat16, rows=True, weights=True, temperature=1.5), LIMITS[torch.bfloat16])


@pytest.mark.parametrize("onednn", [False, True])
def test_fp32_with_and_without_onednn(small_blocks, monkeypatch, onednn):
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build has no oneDNN")
    monkeypatch.setattr(gemms, "has_onednn_fp32", lambda: onednn)
    compare(make_case(bias=True, separate=True), LIMITS[torch.float32])


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_softcap(small_blocks, divergence):
    compare(make_case(bias=True, separate=True, softcap=4.0, temperature=0.8, divergence=divergence), 1e-5)


@pytest.mark.parametrize("pairs", [1, 63, 64, 65, 300])
def test_lengths(pairs):
    compare(make_case(pairs=pairs, vocab=4097), LIMITS[torch.float32])


def test_scale_by_t2():
    case = make_case(temperature=3.0, scale_by_t2=False)
    plain = case.run(linear_kl)["total"]
    scaled = make_case(temperature=3.0).run(linear_kl)["total"]
    torch.testing.assert_close(scaled, 9 * plain)
    compare(case, LIMITS[torch.float32])


def test_jsd_ends_are_the_kls():
    for beta, divergence in ((0.0, "forward"), (1.0, "reverse")):
        case = make_case()
        got = case.run(linear_kl, divergence="jsd", beta=beta)
        assert torch.equal(got["dh"], case.run(linear_kl, divergence=divergence)["dh"])


def test_equal_distributions_give_zero():
    case = make_case(noise=0.0)
    for divergence in ("forward", "reverse", "jsd"):
        got = case.run(linear_kl, divergence=divergence, per_row=True)
        assert got["values"].abs().max() < 2e-6
        assert got["dh"].abs().max() < 1e-6


@pytest.mark.parametrize("vocab_t", [333, 350])
def test_padded_vocabulary_is_left_out(vocab_t):
    case = make_case(separate=True, bias=True, vocab=350)
    case.w_s, case.options["bias_s"] = case.w_s[:340], case.options["bias_s"][:340]
    case.w_t, case.options["bias_t"] = case.w_t[:vocab_t], case.options["bias_t"][:vocab_t]
    case.options["vocab_size"] = 330
    got, exact = case.run(linear_kl), case.exact()
    for key in ("total", "dh", "dw", "db"):
        check(got[key], exact[key], 1e-5)
    assert not got["dw"][330:].any()


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_bias_of_minus_inf_removes_entries(small_blocks, divergence):
    gone = torch.zeros(333, dtype=torch.bool)
    gone[:120] = True  # more than the whole first block
    gone[[200, 332]] = True
    case, kept = with_gone(gone, divergence=divergence)
    got, exact = case.run(linear_kl), kept.exact()
    check(got["total"], exact["total"], 1e-5)
    check(got["dh"], exact["dh"], 1e-5)
    check(got["dw"][~gone], exact["dw"], 1e-5)
    assert not got["dw"][gone].any()


def test_no_pairs_and_all_masked():
    case = make_case()
    for options in (
        {"rows_s": torch.zeros(0, dtype=torch.int64), "rows_t": torch.zeros(0, dtype=torch.int64)},
        {"row_weight": torch.zeros(21)},
        {"row_weight": torch.zeros(21, dtype=torch.bool)},
    ):
        got = case.run(linear_kl, per_row=True, **options)
        assert got["total"] == 0
        assert got["count"] == 0
        assert not got["values"].any()
        assert not got["dh"].any()
        assert not got["dw"].any()
    h = torch.zeros(0, 24, requires_grad=True)
    total, count = linear_kl(h, case.w_s, torch.zeros(0, 24))
    total.backward()
    assert (float(total.detach()), float(count), h.grad.shape) == (0.0, 0.0, (0, 24))


def test_masked_rows_do_not_reach_the_result():
    case = make_case(weights=True)
    clean = case.run(linear_kl, per_row=True)
    for bad in (torch.nan, torch.inf):
        case.h_s[0], case.h_t[3] = bad, bad  # rows 0, 3, 6, ... have weight 0
        dirty = case.run(linear_kl, per_row=True)
        for key, value in clean.items():
            assert torch.equal(dirty[key], value), key


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_not_hidden(divergence, bad):
    for side in ("h_s", "h_t"):
        case = make_case(bias=True)
        getattr(case, side)[5, 2] = bad
        assert case.run(linear_kl, divergence=divergence)["total"].isnan()


def test_mask_equals_selection():
    case = make_case()
    mask = torch.rand(21, generator=torch.Generator().manual_seed(3)) > 0.5
    rows = mask.nonzero().squeeze(1)
    masked = case.run(linear_kl, row_weight=mask)
    selected = case.run(linear_kl, rows_s=rows, rows_t=rows.int())
    for key, value in selected.items():
        assert torch.equal(masked[key], value), key


def test_strided_inputs_and_shared_head_given_twice():
    case = make_case(bias=True)
    (h_s, w_s, h_t, _), options = case.arguments()
    wide = torch.randn(21, 48)
    wide[:, ::2] = h_s.detach()
    strided = wide[:, ::2].requires_grad_()
    head = w_s.detach().t().contiguous().t().requires_grad_()
    total, _ = linear_kl(strided, head, h_t, head.detach(), bias_t=options["bias_s"].detach(), **options)
    (total * 0.5).backward()
    exact = case.exact()
    check(total, exact["total"], 1e-5)
    check(strided.grad, exact["dh"], 1e-5)
    check(head.grad, exact["dw"], 1e-5)


def test_bitwise_repeatable_and_independent_of_what_empty_holds(small_blocks):
    case = make_case(bias=True, rows=True, weights=True)
    same_bits(lambda: case.run(linear_kl, per_row=True))


def test_no_gradients_where_none_are_asked_for():
    (h_s, w_s, h_t, _), _ = make_case().arguments()
    with torch.no_grad():
        total, _ = linear_kl(h_s, w_s, h_t)
    assert not total.requires_grad
    total, _ = linear_kl(h_s.detach(), w_s, h_t)
    total.backward()
    check(w_s.grad, 2 * make_case().exact()["dw"], 1e-5)


def test_reference_and_op_pass_gradcheck():
    case = make_case(torch.float64, pairs=4, width=5, vocab=13, bias=True, weights=True)
    for divergence in ("forward", "reverse", "jsd"):
        for function in (reference, linear_kl):
            (h_s, w_s, h_t, _), options = case.arguments()
            bias = options.pop("bias_s")

            # The teacher's side is a constant, so it must be one for the finite differences too.
            fixed = (w_s.detach().clone(), bias.detach().clone())

            def total(h, w, b, function=function, h_t=h_t, options=options, divergence=divergence, fixed=fixed):
                head, its_bias = fixed
                return function(
                    h, w, h_t, head, bias_s=b, bias_t=its_bias, divergence=divergence, softcap=5.0, **options
                )[0]

            assert torch.autograd.gradcheck(total, (h_s, w_s, bias))


def test_bf16_gradient_near_convergence():
    """KL 0.001: our bf16 gradient is right to its own rounding, eager bf16 logits are wrong by tens of percent."""
    case = make_case(torch.bfloat16, pairs=32, width=256, vocab=4000, noise=0.022)
    exact = case.exact()
    assert 5e-4 < exact["total"] / 32 < 2e-3
    check(case.run(linear_kl)["dh"], exact["dh"], 3e-3)
    eager = case.run(reference)["dh"]
    assert float((eager.double() - exact["dh"]).norm() / exact["dh"].norm()) > 0.2


BAD = [
    ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature is nan"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"divergence": "kl"}, ValueError, "divergence is 'kl'"),
    ({"divergence": "jsd", "beta": 1.5}, ValueError, "beta is 1.5"),
    ({"form": "fast"}, ValueError, "form is 'fast'"),
    ({"vocab_size": 400}, ValueError, "vocab_size is 400"),
    ({"num_valid": 99}, ValueError, "num_valid is 99"),
    ({"rows_s": torch.tensor([0, 21]), "rows_t": torch.tensor([0, 1])}, IndexError, "rows_s holds 21"),
    ({"rows_s": torch.tensor([0, 2]), "rows_t": torch.tensor([-1, 1])}, IndexError, "rows_t holds -1"),
    ({"rows_s": torch.tensor([0.0]), "rows_t": torch.tensor([0])}, TypeError, "rows_s must hold int64"),
    ({"rows_s": torch.tensor([0, 1])}, ValueError, "h_t has 21 rows for 2 pairs"),
    ({"rows_t": torch.tensor([0, 1])}, ValueError, r"rows_t must have shape \(21,\)"),
    ({"row_weight": torch.ones(20)}, ValueError, r"row_weight must have shape \(21,\)"),
    ({"row_weight": torch.ones(21, dtype=torch.int64)}, TypeError, "row_weight must be floating point or bool"),
    ({"row_weight": torch.ones(21, device="meta")}, ValueError, "row_weight is on meta"),
    ({"bias_s": torch.ones(7)}, ValueError, r"bias_s must have shape \(333,\)"),
    ({"bias_t": torch.ones(333)}, ValueError, "bias_t is given but w_t is not"),
    ({"w_s": torch.ones(333, 23)}, ValueError, "h_s is 24 wide but w_s is 23 wide"),
    ({"w_s": torch.ones(333, 24, dtype=torch.bfloat16)}, ValueError, "h_s is torch.float32 but w_s is torch.bfloat16"),
    ({"w_s": torch.ones(333, 24, device="meta")}, ValueError, "w_s is on meta"),
    ({"h_s": torch.ones(21, 24, dtype=torch.int64)}, TypeError, "h_s must be floating point"),
    ({"h_s": torch.ones(3, 7, 24)}, ValueError, "h_s must have 2 dimensions"),
    ({"w_t": torch.ones(340, 24)}, ValueError, "w_s has 333 vocabulary rows but w_t has 340"),
    ({"h_t": None}, ValueError, "h_t is None and so is teacher"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[b[2][:30] for b in BAD])
def test_bad_input(change, kind, message):
    (h_s, w_s, h_t, _), _ = make_case().arguments()
    arguments = {"h_s": h_s, "w_s": w_s, "h_t": h_t, **change}
    with pytest.raises(kind, match=message):
        linear_kl(**arguments)


def test_module():
    case = make_case(rows=True)
    (h_s, w_s, h_t, _), options = case.arguments()
    module = LinearKL(temperature=2.0, divergence="jsd", beta=0.2)
    total, _ = module(h_s, w_s, h_t, **options)
    assert torch.equal(total, linear_kl(h_s, w_s, h_t, temperature=2.0, divergence="jsd", beta=0.2, **options)[0])
    assert "temperature=2.0" in repr(module)
    with pytest.raises(ValueError, match="temperature is -1"):
        LinearKL(temperature=-1)


@pytest.mark.parametrize("trained", ["w_s", "bias_s"])
@pytest.mark.parametrize("options", [{}, {"divergence": "jsd", "softcap": 3.0}], ids=["forward", "jsd"])
def test_a_part_of_the_head_alone_is_trained_over_several_blocks(trained, options, monkeypatch):
    monkeypatch.setattr(tiles, "LINEAR_KL_CPU", tiles.CpuChunks(chunk_rows=8, block_v=64, max_buffer_mib=512))
    case = make_case(bias=True, **options)
    exact = case.exact()["dw" if trained == "w_s" else "db"]
    leaf = (case.w_s if trained == "w_s" else case.options["bias_s"]).clone().requires_grad_()
    given = {**case.options, "bias_s": leaf} if trained == "bias_s" else case.options
    linear_kl(case.h_s, leaf if trained == "w_s" else case.w_s, case.h_t, **given)[0].backward()
    check(leaf.grad * 0.5, exact, 1e-5)
