"""Ahead-of-time gate: compile every kernel with every tile for every architecture, without a GPU, and read the code.

    python -m mtllm_fast.kernels.aot [--arch sm_90 ...] [--json FILE]

A row fails when the kernel spills (a stack frame, LDL/STL, scratch), asks for more shared memory than a block may have
(the compiler does not refuse that), is a GEMM without warp-group instructions on sm_90, or is a streaming kernel for
CUDA with less than 90 % of its row loads 128 bits wide. Row loads are the loads from global memory, asynchronous copies
included, but for those of single numbers (bounds, row numbers, weights of a row), which the kernel's Triton IR counts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import linear_kl_triton
from .aot_cases import fp8_linear_cases, hidden_mse_cases, packed_projection_cases
from .tiles import LINEAR_KL, RowTile

ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMNS = ("arch", "kernel", "specialisation", "tile", "regs", "stack", "LDL/STL", "shared", "128-bit", "HGMMA",
           "LDGSTS", "loops")  # fmt: skip
INSTRUCTION = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?"  # its address and predicate in nvdisasm's text


@dataclass(frozen=True)
class Case:
    """One kernel in one specialisation.

    Attributes:
        kernel: the jitted function.
        label: what is special about it.
        types: argument types by name, as in Triton signatures; the others are constexprs.
        constexprs: values of the constexpr arguments.
        tile: warps and stages.
        divisible: arguments that are multiples of 16 (for pointers: 16-byte aligned), as at run time.
        gemm: the kernel contains `tl.dot`.
        rows: it reads rows, as wide as can be; a kernel over bounds does not.
    """

    kernel: Any
    label: str
    types: dict[str, str]
    constexprs: dict[str, Any]
    tile: RowTile
    divisible: tuple[str, ...]
    gemm: bool = False
    rows: bool = True


@dataclass(frozen=True)
class Report:
    """What the compiled code of one case looks like.

    `async_copies` are copies from global to shared memory that a loop has in flight (LDGSTS), `loops` the instructions
    between the targets of backward branches and these, in order; both only of CUDA.
    """

    kernel: str
    label: str
    arch: str
    tile: str
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    wide_loads: int
    row_loads: int
    hgmma: int
    async_copies: int
    loops: tuple[int, ...]
    problems: tuple[str, ...]


def linear_kl_cases(arch: str) -> Iterator[Case]:
    """All specialisations of the linear_kl kernels that a run on `arch` can ask for, up to unused flag combinations."""
    tiles = LINEAR_KL.get(arch, LINEAR_KL["default"])
    floats = ("inv_temperature", "softcap", "scale", "beta", "grad_scale", "e_scale")

    def case(kernel: Any, label: str, halves: dict[str, str], tile: RowTile, **constexprs: Any) -> Case:
        types = {}
        for name in kernel.arg_names:
            if name in constexprs:
                types[name] = "constexpr"
            elif name.endswith("_ptr"):
                types[name] = "*" + halves.get(name, "i64" if name == "rows_ptr" else "fp32")
            else:
                types[name] = "fp32" if name in floats else "i32"
        divisible = tuple(
            n for n, t in types.items() if t[0] == "*" or n.startswith("stride") or n in ("padded", "width")
        )
        return Case(kernel, label, types, constexprs, tile, divisible)

    rows, exps, finish = tiles.kl_rows, tiles.exp_rows, tiles.finish_moments
    for divergence in ("forward", "reverse", "jsd"):
        for dtype in ("bf16", "fp16", "fp32") if divergence == "forward" else ("bf16",):
            for extras in (False, True):
                yield case(
                    linear_kl_triton.kl_rows,
                    f"{divergence} {dtype}{' +bias +softcap +weight' if extras else ''}",
                    {"grad_ptr": dtype},
                    rows,
                    DIVERGENCE=divergence,
                    HAS_BIAS_S=extras,
                    HAS_BIAS_T=extras,
                    HAS_WEIGHT=extras,
                    HAS_SOFTCAP=extras,
                    NEED_GRAD=True,
                    BARRIER=dtype != "fp32",
                    BLOCK_V=rows.block,
                )
    yield case(
        linear_kl_triton.kl_rows,
        "forward bf16, trained head",
        {"grad_ptr": "bf16"},
        rows,
        DIVERGENCE="forward",
        HAS_BIAS_S=False,
        HAS_BIAS_T=False,
        HAS_WEIGHT=False,
        HAS_SOFTCAP=False,
        NEED_GRAD=True,
        BARRIER=False,
        BLOCK_V=rows.block,
    )
    for dtype in ("bf16", "fp16", "fp32"):
        for teacher in (False, True):
            yield case(
                linear_kl_triton.exp_rows,
                f"{'teacher +bias +softcap' if teacher else 'student'} {dtype}",
                {"e_ptr": dtype},
                exps,
                HAS_BIAS=teacher,
                HAS_VALUE_BIAS=teacher,
                HAS_SOFTCAP=teacher,
                WANT_ENTROPY=teacher,
                BARRIER=dtype != "fp32",
                BLOCK_V=exps.block,
            )
    for dtype in ("bf16", "fp32"):
        yield case(
            linear_kl_triton.finish_moments,
            f"{dtype} +rows +weight",
            {"x_ptr": dtype, "dx_ptr": dtype},
            finish,
            HAS_ROWS=True,
            HAS_WEIGHT=True,
            NEED_GRAD=True,
            BLOCK_D=finish.block,
        )


CASES: tuple[Callable[[str], Iterator[Case]], ...] = (
    linear_kl_cases,
    partial(hidden_mse_cases, Case),
    partial(packed_projection_cases, Case),
    partial(fp8_linear_cases, Case),
)


def compile_case(case: Case, arch: str) -> Any:
    """The compiled kernel; `asm` holds ptx and cubin, or amdgcn and hsaco."""
    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("the kernels were imported for the interpreter; unset TRITON_INTERPRET to compile them")
    target, _ = ARCHITECTURES[arch]
    names = case.kernel.arg_names
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(case.kernel, case.types, constexprs, attrs)
    options = {"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages}
    return triton.compile(source, target=target, options=options)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(BIN / name), *arguments], check=True, capture_output=True, text=True).stdout


def _row_loads(loads: list[str], wide: str, ir: str) -> dict[str, int]:
    """128-bit loads, and all loads but as many narrow ones as the IR has loads of single numbers."""
    single = len(re.findall(r"tt\.load [^\n]*: !tt\.ptr|async_copy_global_to_local [^\n]*: tensor<1x", ir))
    count = sum(wide in op for op in loads)
    return {"wide_loads": count, "row_loads": count + max(0, len(loads) - count - single)}


def _loops(text: str) -> tuple[int, ...]:
    """Instructions of each loop of a disassembly, its backward branch included."""
    places: dict[str, int] = {}
    count, found = 0, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = count
        elif re.search(INSTRUCTION, line):
            count += 1
            target = re.search(rf"{INSTRUCTION}BRA\S*.*`\((\.L_x_\d+)\)", line)
            if target and target[1] in places and count - places[target[1]] > 1:  # a kernel ends in a branch to itself
                found.append(count - places[target[1]])
    return tuple(found)


def _read_cubin(cubin: bytes, ir: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    code = re.findall(rf"{INSTRUCTION}([A-Z0-9_.]+)", text)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack_bytes": numbers["STACK"],
        "spill_instructions": sum(op.startswith(("LDL", "STL")) for op in code),
        "hgmma": sum("HGMMA" in op for op in code),
        "async_copies": sum(op.startswith("LDGSTS") for op in code),
        "loops": _loops(text),
        **_row_loads([op for op in code if op.startswith(("LDG.", "LDGSTS"))], ".128", ir),
    }


def _read_amdgcn(code: str, ir: str) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:?\s+(\d+)", code)
        assert found is not None, f"no .{key} in the amdgcn text"
        return int(found.group(1))

    loads = re.findall(r"^\s+((?:global|buffer)_load_\w+)", code, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "spill_instructions": number("vgpr_spill_count") + len(re.findall(r"^\s+scratch_(?:load|store)", code, re.M)),
        "hgmma": 0,
        "async_copies": 0,
        "loops": (),
        **_row_loads(loads, "dwordx4", ir),
    }


def inspect(case: Case, arch: str) -> Report:
    """Compile one case and judge it."""
    compiled = compile_case(case, arch)
    is_cuda = "cubin" in compiled.asm
    ir = compiled.asm["ttgir"]
    numbers = _read_cubin(compiled.asm["cubin"], ir) if is_cuda else _read_amdgcn(compiled.asm["amdgcn"], ir)
    shared, limit = compiled.metadata.shared, ARCHITECTURES[arch][1]
    problems = []
    if numbers["stack_bytes"] or numbers["spill_instructions"]:
        problems.append("spills")
    if shared > limit:
        problems.append(f"shared memory above {limit}")
    if case.gemm and arch == "sm_90" and not numbers["hgmma"]:
        problems.append("no HGMMA")
    if is_cuda and case.rows and not case.gemm and numbers["wide_loads"] < 0.9 * numbers["row_loads"]:
        problems.append("narrow loads")
    block = next(value for name, value in case.constexprs.items() if name.startswith("BLOCK"))
    tile = f"{block}x{case.tile.num_warps}w{case.tile.num_stages}s"
    return Report(
        case.kernel.__name__, case.label, arch, tile, shared_bytes=shared, problems=tuple(problems), **numbers
    )


def run(archs: list[str]) -> Iterator[Report]:
    """Reports of all kernels, tiles and architectures, in order."""
    for arch in archs:
        for cases in CASES:
            for case in cases(arch):
                yield inspect(case, arch)


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit status is the number of failed rows, at most 1."""
    parser = argparse.ArgumentParser(prog="mtllm_fast.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    options = parser.parse_args(argv)
    line = "{:7} {:15} {:37} {:11} {:>4} {:>5} {:>7} {:>6} {:>9} {:>5} {:>6} {:17} {}"
    print(f"triton {triton.__version__}")
    print(line.format(*COLUMNS, ""))
    reports = []
    for r in run(options.arch):
        reports.append(r)
        wide = f"{r.wide_loads}/{r.row_loads}"
        verdict = ", ".join(r.problems) or "ok"
        print(
            line.format(
                *(r.arch, r.kernel, r.label, r.tile, r.registers, r.stack_bytes, r.spill_instructions, r.shared_bytes),
                *(wide, r.hgmma, r.async_copies, " ".join(map(str, r.loops)), verdict),
            ),
            flush=True,
        )
    failed = sum(bool(r.problems) for r in reports)
    print(f"{len(reports)} compiled, {failed} failed")
    if options.json:
        options.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(r) for r in reports]}, indent=1)
        )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
