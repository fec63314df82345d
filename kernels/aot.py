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
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .aot_cases import (
    Case,
    fp8_linear_cases,
    hidden_mse_cases,
    linear_ce_cases,
    linear_kl_cases,
    packed_projection_cases,
)

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


CASES: tuple[Callable[[str], Iterator[Case]], ...] = (
    linear_kl_cases,
    linear_ce_cases,
    hidden_mse_cases,
    packed_projection_cases,
    fp8_linear_cases,
)


def compile_case(case: Case, arch: str) -> CompiledKernel:
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
