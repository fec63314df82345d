"""Time and memory of the KL over the LM head, forward + backward, against unfused PyTorch, a chunk loop and Liger.

    python -m benchmarks.linear_kl --device cpu --json benchmarks/results/cpu/linear_kl.json

One run holds all variants of a case, interleaved; medians with p20/p80. A variant whose loss or gradient misses the
fp64 reference gets no time. Ratios are printed beside each other at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mtllm_fast.kernels.linear_kl import reference

from benchmarks import linear_kl_variants as variants_
from benchmarks.common import (
    Record,
    commit,
    device_name,
    interleaved,
    peak_incremental_mib,
    percentile,
    relative_error,
    synchronise,
    versions,
    write,
)
from benchmarks.linear_kl_variants import Problem, make_problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_SHAPES = [(2048, 1024, 64000)]
GPU_SHAPES = [
    (t, d, v)
    for d, v in ((2048, 32000), (4096, 128256), (3584, 152064), (2560, 262144))
    for t in (1024, 2048, 4096, 8192, 16384)
]
# Gradient error that a variant may have against fp64, by input dtype. In bf16 the logit rounding of the baselines is
# no failure of theirs to compute what they say, so the gate only asks for the right gradient, not for a good one.
GATE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}
GEMM_FLOPS = {"NVIDIA H100": 795e12, "NVIDIA H200": 790e12}
GEMMS_PER_ROW = {"ours-moments": 2, "ours-moments-uncached": 4}

VARIANTS: dict[str, Callable[[Problem], object]] = {
    "ours": variants_.ours,
    "ours-moments": variants_.ours_moments,
    "ours-moments-uncached": variants_.ours_moments_uncached,
    "unfused": variants_.unfused,
    "chunked": variants_.chunked,
    "liger-chunked": variants_.liger_chunked,
    "gemms": variants_.gemms_ours,
    "gemms-torch": variants_.gemms_torch,
}
GPU_VARIANTS: dict[str, Callable[[Problem], object]] = {
    **VARIANTS,
    "unfused-upcast": variants_.unfused_upcast,
    "compile": variants_.compiled,
    "liger-fused": variants_.liger_fused_jsd,
}
# (numerator, denominator, quantity, aim): the ratios of the issue's "Must show".
RATIOS = (
    ("ours", "unfused", "time", 0.60),
    ("ours", "unfused", "memory", 0.20),
    ("ours", "liger-chunked", "time", 0.60),
    ("ours", "gemms", "time", 1.35),
    ("ours-moments", "ours", "time", 0.75),
)
GATE_ROWS = 64


def gate(name: str, problem: Problem, dtype: str) -> tuple[str, dict[str, float]]:
    """Compare a variant's loss over, and gradient of, the first rows with fp64."""
    if name.startswith("gemms"):
        return "none", {}
    rows = min(GATE_ROWS, problem.rows)
    small = Problem(problem.h_s.detach()[:rows].clone().requires_grad_(), problem.h_t[:rows], problem.w)
    loss = VARIANTS.get(name, GPU_VARIANTS[name])(small)
    h = small.h_s.detach().double().requires_grad_()
    total, _, _ = reference(h, problem.w.double(), small.h_t.double())
    (total / rows).backward()
    assert h.grad is not None
    assert small.h_s.grad is not None
    errors = {"loss": relative_error(loss, total.detach() / rows), "gradient": relative_error(small.h_s.grad, h.grad)}
    return ("pass" if errors["gradient"] <= GATE[dtype] and errors["loss"] <= GATE[dtype] else "fail"), errors


def measure_memory(name: str, shape: tuple[int, int, int], dtype: str, device: str) -> float:
    """Peak incremental memory of one step; on the CPU in a process of its own."""
    if device == "cpu":
        command = [sys.executable, "-m", "benchmarks.linear_kl", "--memory-of", name, "--dtype", dtype]
        command += ["--shape", "x".join(map(str, shape)), "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        if done.returncode:
            raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
        return float(json.loads(done.stdout.splitlines()[-1]))
    return memory_here(name, shape, dtype, device)


def memory_here(name: str, shape: tuple[int, int, int], dtype: str, device: str) -> float:
    """Peak incremental memory of one step in this process, libraries warmed up on a small problem first."""
    run = GPU_VARIANTS[name]
    run(make_problem(32, 64, 512, DTYPES[dtype], device))
    problem = make_problem(*shape, DTYPES[dtype], device)
    if "moments" in name and "uncached" not in name:
        problem.cached_moments()
    return peak_incremental_mib(lambda: run(problem), device)


def run_case(
    shape: tuple[int, int, int], dtype: str, device: str, names: list[str], repeats: int, memory: bool
) -> list[Record]:
    """All variants of one shape, interleaved."""
    rows, width, vocab = shape
    problem = make_problem(*shape, DTYPES[dtype], device)
    table = GPU_VARIANTS
    records, runs = [], {}
    for name in names:
        verdict, errors = gate(name, problem, dtype)
        record = Record(
            "linear_kl forward+backward", {"T": rows, "D": width, "V": vocab}, dtype, device_name(device), name, verdict
        )
        record.gate_detail, record.versions, record.commit = errors, versions(), commit()
        peak = next((flops for key, flops in GEMM_FLOPS.items() if key in record.device), None)
        if peak:
            record.floor_ms = GEMMS_PER_ROW.get(name, 3) * 2e3 * rows * width * vocab / peak
        records.append(record)
        if verdict != "fail":
            runs[name] = lambda name=name: _step(table[name], problem)
        print(f"gate {name:22} {verdict} {errors}", file=sys.stderr)
    if "ours-moments" in runs:
        problem.cached_moments()
    times = interleaved(runs, device, repeats, lambda text: print(text, file=sys.stderr))
    for record in records:
        if record.variant not in times:
            continue
        values = times[record.variant]
        record.time_ms, record.time_ms_p20, record.time_ms_p80 = (percentile(values, q) for q in (0.5, 0.2, 0.8))
        if memory and record.gate == "pass":
            record.peak_incremental_mib = measure_memory(record.variant, shape, dtype, device)
    return records


def _step(run: Callable[[Problem], object], problem: Problem) -> None:
    problem.h_s.grad = None
    run(problem)


def ratios(records: list[Record]) -> list[dict[str, object]]:
    """The ratios of the issue, with the range that p20/p80 of both sides allow."""
    by_name = {r.variant: r for r in records}
    rows: list[dict[str, object]] = []
    for top, bottom, quantity, aim in RATIOS:
        a, b = by_name.get(top), by_name.get(bottom)
        if a is None or b is None:
            continue
        if quantity == "memory":
            if a.peak_incremental_mib is None or not b.peak_incremental_mib:
                continue
            value = a.peak_incremental_mib / b.peak_incremental_mib
            low = high = value
        else:
            if a.time_ms is None or b.time_ms is None:
                continue
            value = a.time_ms / b.time_ms
            low, high = a.time_ms_p20 / b.time_ms_p80, a.time_ms_p80 / b.time_ms_p20
        rows.append(
            {
                "ratio": f"{top} / {bottom}",
                "of": quantity,
                "value": value,
                "low": low,
                "high": high,
                "aim": aim,
                "met": value <= aim,
            }
        )
    return rows


def print_table(records: list[Record]) -> None:
    """The case's table and its ratios."""
    first = records[0]
    print(f"\n{first.case}  {first.shape}  {first.dtype}  {first.device}  commit {first.commit}")
    print("  ".join(f"{k} {v}" for k, v in first.versions.items()))
    print(
        f"{'variant':22} {'gate':5} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'peak MiB':>9} {'% floor':>8} {'grad err':>9}"
    )
    for r in records:
        numbers = [
            f"{x:9.1f}" if x is not None else f"{'-':>9}"
            for x in (r.time_ms, r.time_ms_p20, r.time_ms_p80, r.peak_incremental_mib)
        ]
        floor = f"{100 * r.floor_ms / r.time_ms:8.1f}" if r.floor_ms and r.time_ms else f"{'-':>8}"
        error = f"{r.gate_detail['gradient']:9.1e}" if r.gate_detail else f"{'-':>9}"
        print(f"{r.variant:22} {r.gate:5} {' '.join(numbers)} {floor} {error}")
    for row in ratios(records):
        print(
            f"{row['ratio']:32} {row['of']:7} {row['value']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  "
            f"aim <= {row['aim']}  {'met' if row['met'] else 'NOT MET'}"
        )


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxWIDTHxVOCAB, e.g. 2048x1024x64000")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main(argv: list[str] | None = None) -> int:
    """Run the cases, print the tables, write the records; 1 when a variant of ours fails its gate."""
    parser = argparse.ArgumentParser(prog="benchmarks.linear_kl", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--shape", type=_shape, nargs="+", help="ROWSxWIDTHxVOCAB; default: the issue's shapes")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--variants", nargs="+", choices=sorted(GPU_VARIANTS))
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds after one warm-up round")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--memory-of", choices=sorted(GPU_VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    shapes = options.shape or (CPU_SHAPES if options.device == "cpu" else GPU_SHAPES)
    if options.memory_of:
        print(json.dumps(memory_here(options.memory_of, shapes[0], dtype, options.device)))
        return 0
    names = options.variants or list(VARIANTS if options.device == "cpu" else GPU_VARIANTS)
    synchronise(options.device)
    records: list[Record] = []
    for shape in shapes:
        case = run_case(shape, dtype, options.device, names, options.repeats, not options.no_memory)
        print_table(case)
        records += case
        if options.json:
            write(options.json, records)
    return int(any(r.gate == "fail" and r.variant.startswith("ours") for r in records))


if __name__ == "__main__":
    sys.exit(main())
