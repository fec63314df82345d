"""The same checks on a GPU: `pytest -m gpu tests/kernels`. Skipped without one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from mtllm_fast.kernels import linear_kl, teacher_moments
from mtllm_fast.kernels import linear_kl_ops as ops

from tests.kernels.linear_kl_cases import LIMITS, check, exact_fp32_gemms, make_case  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_fp32_gemms"),
]
FLAGS = ("separate", "bias", "rows", "weights")


def compare(case, **extra):
    got, exact = case.run(linear_kl, device="cuda", per_row=True, **extra), case.exact()
    for key, value in exact.items():
        check(got[key], value, LIMITS[case.h_s.dtype])


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", itertools.product((False, True), repeat=4))
def test_matches_fp64(divergence, dtype, flags):
    compare(make_case(dtype, width=64, vocab=3001, **dict(zip(FLAGS, flags)), divergence=divergence, temperature=1.3))


@pytest.mark.parametrize("pairs", [1, 63, 64, 65, 1025, 2500])
def test_lengths(pairs):
    compare(make_case(torch.bfloat16, pairs=pairs, width=64, vocab=4096))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap(dtype):
    compare(make_case(dtype, width=64, vocab=5000, softcap=4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments(dtype):
    case = make_case(dtype, width=64, vocab=3001, bias=True)
    (h_s, w_s, h_t, _), options = case.arguments(device="cuda")
    bias = options["bias_s"].detach()
    cached = teacher_moments(h_t, w_s.detach(), bias_t=bias)
    total, _ = linear_kl(h_s, w_s.detach(), teacher=cached, bias_s=bias)
    (total * 0.5).backward()
    exact = case.exact()
    check(total, exact["total"], LIMITS[dtype])
    check(h_s.grad, exact["dh"], 2 * LIMITS[dtype])


def test_num_valid_and_all_masked():
    case = make_case(torch.bfloat16, width=64, vocab=3001, rows=True, weights=True)
    valid = int((case.options["row_weight"] != 0).sum())
    compare(case, num_valid=valid)
    case.options["row_weight"][:] = 0
    got = case.run(linear_kl, device="cuda")
    assert got["total"] == 0
    assert not got["dh"].any()


def test_bitwise_repeatable():
    case = make_case(torch.bfloat16, pairs=1500, width=128, vocab=9001, bias=True, rows=True, weights=True)
    runs = [case.run(linear_kl, device="cuda") for _ in range(3)]
    for key, value in runs[0].items():
        assert all(torch.equal(run[key], value) for run in runs[1:]), key


def test_no_host_sync():
    (h_s, w_s, h_t, _), options = make_case(
        torch.bfloat16, pairs=700, width=64, vocab=3001, rows=True, weights=True
    ).arguments(device="cuda")
    linear_kl(h_s, w_s, h_t, **options)[0].backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_kl(h_s, w_s, h_t, **options)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_addresses_beyond_2_to_the_31():
    """8200 x 262144 logits pass 2^31; with one chunk for all rows the last row must still be right."""
    from mtllm_fast.kernels import linear_kl_launch, tiles

    g = torch.Generator(device="cuda").manual_seed(0)
    h_t = torch.randn(8200, 16, device="cuda", generator=g).bfloat16()
    h_s = (h_t.float() + 0.3 * torch.randn(8200, 16, device="cuda", generator=g)).bfloat16()
    w = torch.randn(262144, 16, device="cuda", generator=g).bfloat16()
    whole = tiles.LinearKLTiles(8200, tiles.RowTile(2048, 8), tiles.RowTile(4096, 8), tiles.RowTile(1024, 4))
    all_rows = ops.Difference(h_s=h_s, w_s=w, h_t=h_t, need_dh=True)
    _, values, dh, _, _ = linear_kl_launch.difference_triton(all_rows, whole)
    last = linear_kl_launch.difference_triton(replace(all_rows, h_s=h_s[-8:], h_t=h_t[-8:]))
    check(values[-8:], last[1].double().cpu(), 1e-5)
    # two shapes of GEMM may round a few of the 128 bf16 entries apart, half a percent each; a wrong address is off by all
    check(dh[-8:], last[2].double().cpu(), 4e-3)


def test_compile_and_opcheck():
    case = make_case(torch.bfloat16, width=64, vocab=3001)
    (h_s, w_s, h_t, _), _ = case.arguments(device="cuda")
    eager = linear_kl(h_s, w_s, h_t)[0]
    fused = torch.compile(lambda h: linear_kl(h, w_s, h_t)[0], fullgraph=True)(h_s)
    assert torch.equal(eager, fused)
    inputs = ops.difference.inputs(h_s=h_s, w_s=w_s, h_t=h_t, need_dh=True, need_dw=True)
    torch.library.opcheck(ops.difference.op, inputs)
