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
import warnings
from collections.abc import Callable
from itertools import groupby
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
# Sustained bf16 GEMM FLOP/s and copy bytes/s, for floors and predictions.
CEILINGS = {"NVIDIA H100": (795e12, 3.0e12), "NVIDIA H200": (790e12, 4.0e12)}
# (GEMMs, bytes per logit that the row kernels move) with a frozen head.
WORK = {"ours": (3, 18), "ours-moments": (2, 10), "ours-moments-uncached": (4, 20)}

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
    """Compare a variant's loss over, and gradients of, the first rows with fp64."""
    if name.startswith("gemms"):
        return "none", {}
    rows = min(GATE_ROWS, problem.rows)
    mask = None if problem.mask is None else problem.mask[:rows]
    train_head = problem.w.requires_grad
    head = problem.w.detach().clone().requires_grad_() if train_head else problem.w
    small = Problem(problem.h_s.detach()[:rows].clone().requires_grad_(), problem.h_t[:rows], head, mask)
    loss = GPU_VARIANTS[name](small)
    h, w = (x.detach().double().requires_grad_(x.requires_grad) for x in (small.h_s, head))
    total, count, _ = reference(h, w, small.h_t.double(), row_weight=mask)
    (total / count).backward()
    errors = {"loss": relative_error(loss, total.detach() / count), "gradient": _error(small.h_s, h)}
    if train_head:
        errors["head_gradient"] = _error(head, w)
    return ("pass" if max(errors.values()) <= GATE[dtype] else "fail"), errors


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.grad is not None
    assert want.grad is not None
    return relative_error(got.grad, want.grad)


def predicted(name: str, shape: tuple[int, int, int], device: str, share: float = 1.0) -> tuple[float, float] | None:
    """(GEMM floor, predicted time) in ms of a variant of ours with a frozen head; `share` of the rows count."""
    ceiling = next((c for key, c in CEILINGS.items() if key in device), None)
    if ceiling is None or name not in WORK:
        return None
    rows, width, vocab = shape
    gemms, moved = WORK[name]
    floor = gemms * 2e3 * rows * share * width * vocab / ceiling[0]
    return floor, floor + moved * 1e3 * rows * share * vocab / ceiling[1]


def measure_memory(name: str, shape: tuple[int, int, int], dtype: str, device: str, **problem: object) -> float:
    """Peak incremental memory of one step; on the CPU in a process of its own."""
    if device != "cpu":
        return memory_here(name, shape, dtype, device, **problem)
    command = [sys.executable, "-m", "benchmarks.linear_kl", "--memory-of", name, "--dtype", dtype]
    command += ["--shape", "x".join(map(str, shape)), "--threads", str(torch.get_num_threads())]
    command += ["--masked", str(problem["masked"])] + (["--train-head"] if problem["train_head"] else [])
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def memory_here(name: str, shape: tuple[int, int, int], dtype: str, device: str, **problem: object) -> float:
    """Peak incremental memory of one step in this process, libraries warmed up on a small problem first."""
    run = GPU_VARIANTS[name]
    run(make_problem(32, 64, 512, DTYPES[dtype], device, **problem))
    large = make_problem(*shape, DTYPES[dtype], device, **problem)
    if name == "ours-moments":
        large.cached_moments()
    return peak_incremental_mib(lambda: run(large), device)


def host_syncs(run: Callable[[], object]) -> int:
    """How often a CUDA step stops the host."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def run_case(
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    names: list[str],
    repeats: int,
    memory: bool,
    **options: object,
) -> list[Record]:
    """All variants of one shape, interleaved. `options`: masked, train_head."""
    rows, width, vocab = shape
    problem = make_problem(*shape, DTYPES[dtype], device, **options)
    case = (
        "linear_kl"
        + (" trained head" if options["train_head"] else "")
        + (f" {options['masked']:.0%} masked" if options["masked"] else "")
    )
    records, runs = [], {}
    for name in names:
        if options["train_head"] and "moments" in name:
            continue
        verdict, errors = gate(name, problem, dtype)
        record = Record(case, {"T": rows, "D": width, "V": vocab}, dtype, device_name(device), name, verdict)
        record.gate_detail, record.versions, record.commit = errors, versions(), commit()
        expected = predicted(name, shape, record.device, problem.valid / rows)
        record.floor_ms = expected[0] if expected else None
        records.append(record)
        if verdict != "fail":
            runs[name] = lambda name=name: _step(GPU_VARIANTS[name], problem)
        print(f"gate {name:22} {verdict} {errors}", file=sys.stderr)
    if "ours-moments" in runs:
        problem.cached_moments()
    log = lambda text: print(text, file=sys.stderr)  # noqa: E731
    times = interleaved(runs, device, repeats, log)
    problem.backward = False
    forward = interleaved(
        {n: r for n, r in runs.items() if not n.startswith("gemms")}, device, 1 if device == "cpu" else 3, log
    )
    problem.backward = True
    for record in records:
        if record.variant not in times:
            continue
        values = record.round_ms = times[record.variant]
        record.time_ms, record.time_ms_p20, record.time_ms_p80 = (percentile(values, q) for q in (0.5, 0.2, 0.8))
        if record.variant in forward:
            record.forward_ms = percentile(forward[record.variant], 0.5)
        if device != "cpu":
            record.host_syncs = host_syncs(runs[record.variant])
        if memory and record.gate == "pass":
            record.peak_incremental_mib = measure_memory(record.variant, shape, dtype, device, **options)
    return records


def _step(run: Callable[[Problem], object], problem: Problem) -> None:
    problem.h_s.grad = problem.w.grad = None
    run(problem)


def predictions(shapes: list[tuple[int, int, int]]) -> list[Record]:
    """Records of what an H100 should need, for a reader without one: times are predicted, nothing is measured."""
    records = []
    for rows, width, vocab in shapes:
        for name in WORK:
            expected = predicted(name, (rows, width, vocab), "NVIDIA H100")
            assert expected is not None
            record = Record(
                "linear_kl", {"T": rows, "D": width, "V": vocab}, "bf16", "NVIDIA H100 80GB HBM3", name, "none"
            )
            record.floor_ms, record.versions, record.commit = expected[0], versions(), commit()
            record.notes = f"not measured; predicted {expected[1]:.1f} ms"
            records.append(record)
            print(f"{rows:6} {width:5} {vocab:7}  {name:22} floor {expected[0]:6.1f} ms  {record.notes}")
    return records


def ratios(records: list[Record]) -> list[dict[str, object]]:
    """The ratios of the issue: median, p20 and p80 of the ratios within each round, where both ran side by side."""
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
            rounds = [x / y for x, y in zip(a.round_ms, b.round_ms, strict=True)]
            if not rounds:
                continue
            value, low, high = (percentile(rounds, q) for q in (0.5, 0.2, 0.8))
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
    columns = "{:22} {:5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>5} {:>9}"
    print(
        columns.format("variant", "gate", "p50 ms", "p20", "p80", "forward", "peak MiB", "% floor", "syncs", "grad err")
    )

    def number(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    for r in records:
        share = 100 * r.floor_ms / r.time_ms if r.floor_ms and r.time_ms else None
        times = (
            number(x) for x in (r.time_ms, r.time_ms_p20, r.time_ms_p80, r.forward_ms, r.peak_incremental_mib, share)
        )
        syncs, error = number(r.host_syncs, "d"), number(r.gate_detail.get("gradient"), ".1e")
        print(columns.format(r.variant, r.gate, *times, syncs, error))
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
    parser.add_argument("--masked", type=float, default=0.0, help="share of rows that do not count")
    parser.add_argument("--train-head", action="store_true", help="the head gets a gradient too (no moment form)")
    parser.add_argument(
        "--predict", action="store_true", help="print an H100's floors and predicted times, run nothing"
    )
    parser.add_argument("--show", type=Path, help="print the tables of a result file, run nothing")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--memory-of", choices=sorted(GPU_VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    shapes = options.shape or (CPU_SHAPES if options.device == "cpu" else GPU_SHAPES)
    kind = {"masked": options.masked, "train_head": options.train_head}
    if options.memory_of:
        print(json.dumps(memory_here(options.memory_of, shapes[0], dtype, options.device, **kind)))
        return 0
    if options.show:
        for _, group in groupby(
            (Record(**row) for row in json.loads(options.show.read_text())),
            key=lambda r: (r.case, r.shape, r.dtype, r.device),
        ):
            print_table(list(group))
        return 0
    if options.predict:
        records = predictions(options.shape or GPU_SHAPES)
        if options.json:
            write(options.json, records)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU; --predict prints what one should need")
    names = options.variants or list(VARIANTS if options.device == "cpu" else GPU_VARIANTS)
    synchronise(options.device)
    records = []
    for shape in shapes:
        case = run_case(shape, dtype, options.device, names, options.repeats, not options.no_memory, **kind)
        print_table(case)
        records += case
        if options.json:
            write(options.json, records)
    return int(any(r.gate == "fail" and r.variant.startswith("ours") for r in records))


if __name__ == "__main__":
    sys.exit(main())
