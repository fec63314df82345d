"""The ahead-of-time gate over hidden_mse, packed_projection and fp8_linear: no spills, tensor cores, wide loads, 64-bit rows."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from mtllm_fast.kernels import aot, tiles
from mtllm_fast.kernels.aot_cases import fp8_linear_cases, hidden_mse_cases, packed_projection_cases

STREAMING = {"pool_rows", "state_gradient", "pair_values", "norm_rows"}


def cases(arch: str) -> list[aot.Case]:
    return [*hidden_mse_cases(arch), *packed_projection_cases(arch)]


def named(kernel: str, part: str, arch: str = "sm_90") -> aot.Case:
    return next(c for c in cases(arch) if c.kernel.__name__ == kernel and part in c.label)


def test_every_architecture_has_a_tile():
    for table in (tiles.HIDDEN_MSE, tiles.PACKED_PROJECTION):
        assert set(aot.ARCHITECTURES) | {"default"} == set(table)


@pytest.mark.parametrize("arch", sorted(aot.ARCHITECTURES))
@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        ("state_gradient", "+weight +more bf16 D=4096"),
        ("pool_rows", "bf16 D=4096"),
        ("projection_gemm", "bf16 layer none"),
    ],
)
def test_main_kernels_pass_everywhere(arch, kernel, label):
    report = aot.inspect(named(kernel, label, arch), arch)
    assert report.problems == ()
    if kernel == "projection_gemm" and arch == "sm_90":
        assert report.hgmma > 0


def wide_share(case: aot.Case) -> float:
    """Share of 128-bit loads among the loads of row data: all loads but those of one number (an edge, a weight)."""
    report = aot.inspect(case, "sm_90")
    assert report.row_loads
    return report.wide_loads / report.row_loads


STREAMS = [c for c in cases("sm_90") if c.kernel.__name__ in STREAMING and "fp16" not in c.label]


@pytest.mark.parametrize("case", STREAMS, ids=lambda c: f"{c.kernel.__name__} {c.label}")
def test_streaming_kernels_load_128_bits(case):
    assert wide_share(case) >= 0.9


@pytest.mark.parametrize(
    ("kernel", "label"),
    [("pool_rows", "bf16 D=1024"), ("pool_rows", "bf16 D=4096"), ("state_gradient", "pooled +more bf16 D=4096")],
)
def test_loops_over_rows_have_rows_in_flight(kernel, label):
    """Copies before the loop and in it; as many rows as the tile says, and not one with a single stage."""
    case = named(kernel, label)
    assert case.constexprs["STAGES"] > 2
    report = aot.inspect(case, "sm_90")
    assert report.async_copies > 2
    assert report.shared_bytes >= (case.constexprs["STAGES"] - 1) * case.constexprs["BLOCK_D"] * 2
    alone = aot.inspect(replace(case, constexprs={**case.constexprs, "STAGES": 1}), "sm_90")
    assert alone.async_copies == 0


def test_wide_share_has_a_negative_control():
    """Rows of a width that is no multiple of 16 cannot be read 128 bits at a time."""
    case = named("pool_rows", "bf16 D=4096")
    odd = replace(case, divisible=tuple(n for n in case.divisible if n not in ("width", "stride_x")))
    assert wide_share(odd) < 0.9


def test_a_gemm_without_tensor_cores_fails():
    case = named("projection_gemm", "bf16 none none")
    ieee = replace(case, types={k: "*fp32" if v == "*bf16" else v for k, v in case.types.items()},
                   constexprs={**case.constexprs, "BLOCK_T": 32, "BLOCK_D": 32}, tile=tiles.RowTile(32, 4, 1))  # fmt: skip
    assert "no HGMMA" in aot.inspect(ieee, "sm_90").problems


def test_rows_are_addressed_in_64_bits():
    for kernel, label in (("pool_rows", "bf16"), ("state_gradient", "+weight +more"), ("pair_values", "bf16")):
        code = aot.compile_case(named(kernel, label), "sm_90").asm["ttir"]
        products = re.findall(r"arith\.muli %\w+, %(stride_\w+|width)\w* : (i\d+)", code)
        assert all(kind == "i64" for _, kind in products), products
        assert "i64" in code


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_rows_to_fp8_round_to_nearest_and_saturate(arch):
    for case in fp8_linear_cases(arch):
        assert aot.inspect(case, arch).problems == ()
        if "16384" in case.label:
            code = aot.compile_case(case, arch).asm
            assert "cvt.rn.satfinite.e4m3x2.f32" in code["ptx"]
            assert "arith.extsi" in code["ttir"]  # rows are addressed in 64 bits
    assert not list(fp8_linear_cases("sm_80"))
