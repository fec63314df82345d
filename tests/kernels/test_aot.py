"""The ahead-of-time gate: it passes on our kernels, fails on a tile that spills, and shows 64-bit addresses."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from mtllm_fast.kernels import aot, tiles

CASES = list(aot.linear_kl_cases("sm_90"))


def named(label: str) -> aot.Case:
    return next(case for case in CASES if case.label == label)


def test_every_architecture_has_a_tile():
    assert set(aot.ARCHITECTURES) | {"default"} == set(tiles.LINEAR_KL)


@pytest.mark.parametrize("arch", sorted(aot.ARCHITECTURES))
@pytest.mark.parametrize("label", ["forward bf16", "student bf16"])
def test_main_kernels_pass_everywhere(arch, label):
    case = next(case for case in aot.linear_kl_cases(arch) if case.label == label)
    report = aot.inspect(case, arch)
    assert report.problems == ()
    assert report.registers <= 128
    assert report.wide_loads >= 4
    assert arch == "gfx942" or report.wide_loads == report.row_loads


def test_a_tile_that_spills_fails():
    """Negative control: 128 logits of either side per thread do not fit in its registers."""
    case = named("forward bf16")
    wide = replace(case, tile=tiles.RowTile(16384, 4), constexprs={**case.constexprs, "BLOCK_V": 16384})
    report = aot.inspect(wide, "sm_90")
    assert report.spill_instructions > 0
    assert "spills" in report.problems


@pytest.mark.parametrize("label", ["forward bf16", "forward fp16"])
def test_row_kernel_leaves_room_for_four_programs_on_an_sm(label):
    """64 registers of 256 threads are a quarter of an SM's; before, two exponentials a side took 358 and 206."""
    report = aot.inspect(named(label), "sm_90")
    assert report.registers <= 64
    statistics, gradient = report.loops
    assert statistics <= 240
    assert gradient <= 130


@pytest.mark.parametrize("case", aot.linear_ce_cases("sm_90"), ids=lambda case: case.label)
def test_cross_entropy_row_kernel(case):
    report = aot.inspect(case, "sm_90")
    assert report.problems == ()
    assert report.registers <= 64
    assert report.wide_loads >= 4


def test_loops_are_counted():
    text = """.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/              @!P1 BRA.U `(.L_x_0) ;
.L_x_1:
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
"""
    assert aot._loops(text) == (3,)


def test_narrow_loads_fail():
    """Negative control: without aligned pointers and strides the compiler may not load 128 bits at once."""
    report = aot.inspect(replace(named("forward bf16"), divisible=()), "sm_90")
    assert report.wide_loads < 0.9 * report.row_loads
    assert "narrow loads" in report.problems


def test_rows_are_addressed_in_64_bits():
    """T · V passes 2^31: every product of a row number and a stride must be a 64-bit one."""
    for case in (named("forward bf16"), named("student bf16"), named("bf16 +rows +weight")):
        code = aot.compile_case(case, "sm_90").asm["ttir"]
        row = re.search(r"(%\w+) = tt\.get_program_id x : i32", code).group(1)
        assert re.search(rf"arith\.extsi {row} : i32 to i64", code)
        strided = re.findall(r"tt\.addptr (%\w+), %\w+ : !tt\.ptr<(?:f32|bf16)>, (i\d+)", code)
        assert strided
        assert {kind for base, kind in strided if "stride" not in base} == {"i64"}


def test_in_place_gradient_is_stored_behind_a_barrier_and_rounded():
    code = aot.compile_case(named("forward bf16"), "sm_90").asm["ptx"]
    last_loop = code[: code.rindex("st.global")]
    assert "bar.sync" in last_loop[last_loop.rindex("ld.global") :]
    assert "cvt.rn.bf16x2.f32" in code
    assert "cvt.rz.bf16" not in code


def test_gate_exits_1_on_a_failure(monkeypatch, capsys):
    case = named("forward bf16")
    bad = replace(case, tile=tiles.RowTile(16384, 4), constexprs={**case.constexprs, "BLOCK_V": 16384})
    monkeypatch.setattr(aot, "CASES", (lambda arch: [bad],))
    assert aot.main(["--arch", "sm_90"]) == 1
    assert "1 compiled, 1 failed" in capsys.readouterr().out
    monkeypatch.setattr(aot, "CASES", (lambda arch: [case],))
    assert aot.main(["--arch", "sm_90"]) == 0
