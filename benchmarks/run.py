"""Measures registered cases: gate first, then all variants interleaved, memory, host syncs, share of the floor.

python -m benchmarks.run linear_kl --device cpu --json F        the same as `mtllm bench linear_kl ...`
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ceilings as ceilings_
from .apart import apart
from .common import (
    DTYPES,
    Record,
    host_syncs,
    interleaved,
    parser_of,
    peak_incremental_mib,
    percentile,
    record_here,
    synchronise,
    timed_once,
    write,
)
from .registry import MODULES, Case, Size, Study, Work, chosen, gate, get, module_of, wanted
from .sources import sources_hash

LEAST_MS = 5.0  # a timed round of a CUDA variant lasts at least so long
PROVISIONAL = "one run, before the rounds"


@dataclass(frozen=True)
class Measuring:
    """What is measured, and how often.

    Fields:
        variants: names; empty for all that can run here and are not slow.
        quick: small sizes and quick variants only.
        repeats: timed rounds. memory: also peak memory.
        log: called with lines about what is going on.
    """

    variants: Sequence[str] = ()
    quick: bool = False
    repeats: int = 7
    memory: bool = True
    log: Callable[[str], None] = lambda _: None


def run_case(
    case: Case,
    size: Size,
    device: str,
    dtype: str,
    *,
    ceilings: dict[str, float],
    how: Measuring,
    save: Callable[[list[Record]], None] = lambda _: None,
) -> list[Record]:
    """Records of every variant at one size. A variant whose gate is not green gets no time and no memory.

    Args:
        ceilings: from `ceilings.measure`.
        save: called with the records so far after every variant, round and memory: a run that is ended loses no more
            than what it was at. Until the first round a variant's time is that of one run, and its note says so.
    """
    log = how.log
    problem = case.build(size, DTYPES[dtype], device)
    least = case.work(problem) if case.work else None
    records: list[Record] = []
    runs: dict[str, Callable[[], object]] = {}
    want: dict[str, Tensor] | None = None
    for name in names_of(case, how.variants, how.quick):
        variant = case.variants[name]
        if (why := variant.missing(device)) or (variant.applies and not variant.applies(problem)):
            log(f"{case.name} {size['label']} {name}: left out{', ' + why if why else ''}")
            continue
        record = record_here(case.name, case.shape(problem), dtype, device, name, "fail", ceilings=ceilings)
        record.size, record.ours = size["label"], variant.ours
        record.source_files, record.sources = case.sources, sources_hash(case.sources)
        work = variant.work(problem) if variant.work else least
        if work is not None:
            set_floor(record, work)
        records.append(record)
        try:
            if want is None and variant.gated:
                want = wanted(case, problem)
            record.gate, record.gate_detail = gate(case, name, problem, dtype, want)
            log(f"{case.name} {size['label']} {name}: gate {record.gate} {record.gate_detail}")
            if record.gate == "fail":
                record.notes = "wrong result: no speed is reported"
                save(records)
                continue
            if variant.prepare:
                variant.prepare(problem)
            variant.run(problem)
            record.time_ms, record.notes = timed_once(partial(variant.run, problem), device), PROVISIONAL
            runs[name] = partial(variant.run, problem)
        except torch.OutOfMemoryError:
            record.notes = "out of memory"
        except Exception as error:  # one variant that breaks must not hide the others
            record.gate, record.notes = "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            log(f"{case.name} {size['label']} {name}: {traceback.format_exc()}")
        save(records)
        if name not in runs and device != "cpu":
            torch.cuda.empty_cache()
    time_records({r.variant: r for r in records}, runs, problem, device, how.repeats, log, partial(save, records))
    if case.floor_variant in runs:
        floor = next(r.time_ms for r in records if r.variant == case.floor_variant)
        for record in records:
            record.floor_ms = floor
    if how.memory:
        for record in records:
            if record.gate == "pass" and record.variant in runs:
                record.peak_incremental_mib = measure_memory(case, size, record.variant, dtype, device, problem)
                log(f"{case.name} {size['label']} {record.variant}: {record.peak_incremental_mib:.0f} MiB")
                save(records)
    return records


def names_of(case: Case, variants: Sequence[str], quick: bool) -> list[str]:
    """The variants to run: those named, or all but the slow ones."""
    if variants:
        return [n for n in variants if n in case.variants]
    return [n for n, v in case.variants.items() if not v.slow and (v.quick or not quick)]


def set_floor(record: Record, work: Work) -> None:
    """Floor of a record from the least work and its ceilings."""
    record.floor_bytes, record.floor_flops = work.bytes, work.flops
    record.floor_ms = ceilings_.floor_ms(work.bytes, work.flops, record.dtype, record.ceilings)


def time_records(
    records: dict[str, Record],
    runs: dict[str, Callable[[], object]],
    problem: Any,
    device: str,
    repeats: int,
    log: Callable[[str], None],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Interleaved times, forward alone where the problem can leave its backward out, host syncs."""
    inner = dict.fromkeys(runs, 1)
    if device != "cpu":
        for name, run in runs.items():
            inner[name] = max(1, min(50, int(LEAST_MS / max(ceilings_.best(run, device, 0.0, 2) * 1e3, 1e-3))))

    def many(name: str) -> None:
        for _ in range(inner[name]):
            runs[name]()

    def fill(times: dict[str, list[float]]) -> None:
        for name, values in times.items():
            record = records[name]
            record.timed([t / inner[name] for t in values])
            record.notes = ""
        save()

    interleaved({n: partial(many, n) for n in runs}, device, repeats, log, fill)
    if device != "cpu":
        for name, run in runs.items():
            records[name].host_syncs = host_syncs(run)
    if hasattr(problem, "backward"):
        problem.backward = False
        passed = [name for name in runs if records[name].gate == "pass"]
        forward = interleaved({name: partial(many, name) for name in passed}, device, 3)
        problem.backward = True
        for name, values in forward.items():
            records[name].forward_ms = percentile(values, 0.5) / inner[name]
    save()


def measure_memory(case: Case, size: Size, name: str, dtype: str, device: str, problem: Any) -> float:
    """Peak incremental memory of one step; on the CPU in a process of its own, by its resident high-water mark."""
    if device != "cpu":
        return peak_incremental_mib(partial(case.variants[name].run, problem), device)
    cases = [module_of(name) for name in MODULES]
    return float(
        apart("forkserver", memory_here, case.name, dict(size), name, dtype, torch.get_num_threads(), preload=cases)
    )


def memory_here(case_name: str, size: Size, name: str, dtype: str, threads: int) -> float:
    """Peak incremental memory of a CPU step in this process, its libraries warmed up on a tiny problem first."""
    torch.set_num_threads(threads)
    case = get(case_name)
    assert isinstance(case, Case)
    variant = case.variants[name]
    for options in ({"label": "warm", **case.warm}, size):
        problem = case.build(options, DTYPES[dtype], "cpu")
        if variant.prepare:
            variant.prepare(problem)
        if options is not size or "compiler" in variant.needs:  # compiling is not part of a step
            variant.run(problem)
    return peak_incremental_mib(partial(variant.run, problem), "cpu")


def run(
    names: Sequence[str] = ("all",),
    *,
    device: str = "cpu",
    dtype: str | None = None,
    sizes: Sequence[str] = (),
    how: Measuring | None = None,
    path: Path | None = None,
    show: Callable[[list[Record]], None] | None = None,
) -> list[Record]:
    """Run cases, write the records after each variant (see `run_case`).

    Args:
        names: cases, or "all".
        device: "cpu" or "cuda". dtype: "fp32", "bf16" or "fp16"; None for the case's own.
        sizes: labels; empty for the case's sizes of this device, or its quick ones.
        show: called with the records of each size.

    Raises:
        ValueError: an unknown case, size or variant, or CUDA without a GPU.
    """
    how = how or Measuring()
    cases = chosen(tuple(names))
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: expected 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no GPU")
    if how.repeats < 1:
        raise ValueError(f"repeats={how.repeats}: must be at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    for case in cases:  # "all" leaves them out of a part
        if isinstance(case, Study) and case.name in names and (sizes or how.variants):
            asked = f"sizes={list(sizes)}" if sizes else f"variants={list(how.variants)}"
            raise ValueError(f"{asked}: {case.name} measures itself as a whole; name it without")
    known = {name for case in cases if isinstance(case, Case) for name in case.variants}
    for name in how.variants:
        if name not in known:
            raise ValueError(f"variant {name!r} is unknown; there are: {', '.join(sorted(known))}")
    chosen_sizes = {
        case.name: [case.size(label, device) for label in sizes] or list(case.sizes["quick" if how.quick else device])
        for case in cases
        if isinstance(case, Case)
    }
    ceilings = ceilings_.measure(device)
    how.log(ceilings_.describe(ceilings))
    records: list[Record] = []

    def save(found: Sequence[Record] = ()) -> None:
        if path:
            write(path, [*records, *found])

    def add(found: list[Record]) -> None:
        records.extend(found)
        save()
        if show and found:
            show(found)

    for case in cases:
        if isinstance(case, Study):
            if device in case.devices and not (sizes or how.variants):
                how.log(f"{case.name}: {case.about}")
                found = case.run(device=device, repeats=how.repeats, memory=how.memory, quick=how.quick)
                for record in found:
                    record.source_files, record.sources = case.sources, sources_hash(case.sources)
                    record.ceilings = record.ceilings or ceilings
                    if record.floor_flops is not None and record.floor_ms is None:
                        set_floor(record, Work(record.floor_bytes or 0.0, record.floor_flops))
                add(found)
            continue
        for size in chosen_sizes[case.name]:
            add(run_case(case, size, device, dtype or case.dtypes[device], ceilings=ceilings, how=how, save=save))
    save()
    return records


def aims(case: Case, records: list[Record]) -> Iterator[str]:
    """A line for each aim of the case at one size: median, p20 and p80 of the ratios within each round, where both ran
    side by side."""
    by_name = {r.variant: r for r in records}
    for top, bottom, quantity, aim in case.aims.get(records[0].size, ()):
        a, b = by_name.get(top), by_name.get(bottom)
        if a is None or b is None or "fail" in (a.gate, b.gate) or not (a.round_ms and b.round_ms):
            continue
        pairs: list[tuple[float | None, float | None]]
        if quantity == "memory":
            pairs = [(a.peak_incremental_mib, b.peak_incremental_mib)]
        elif quantity == "forward":
            pairs = [(a.forward_ms, b.time_ms)]
        else:
            pairs = [*zip(a.round_ms, b.round_ms, strict=True)]
        if values := [x / y for x, y in pairs if x is not None and y]:
            middle, low, high = (percentile(values, q) for q in (0.5, 0.2, 0.8))
            verdict = f"aim <= {aim}  {'met' if middle <= aim else 'NOT MET'}"
            yield f"{f'{top} / {bottom}':34} {quantity:7} {middle:.3f}  [{low:.3f}, {high:.3f}]  {verdict}"


def print_table(records: list[Record]) -> None:
    """The table of one case at one size, and its ratios."""
    first = records[0]
    print(f"\n{first.case}, {first.size}  {first.shape}  {first.dtype}  {first.device}  commit {first.commit}")
    columns = "{:24} {:5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>5} {:>8}"
    print(columns.format("variant", "gate", "p50 ms", "p20", "p80", "forward", "peak MiB", "% floor", "syncs", "error"))

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    for r in records:
        share = 100 * r.floor_ms / r.time_ms if r.floor_ms and r.time_ms else None
        times = (number(x) for x in (r.time_ms, r.time_ms_p20, r.time_ms_p80, r.forward_ms))
        error = number(max(r.gate_detail.values()) if r.gate_detail else None, ".0e")
        memory = number(r.peak_incremental_mib, ".1f")
        line = columns.format(r.variant, r.gate, *times, memory, number(share, ".0f"), number(r.host_syncs, "d"), error)
        print(line + (f"  {r.notes}" if r.notes else ""))
    case = chosen((first.case,))[0] if first.size else None
    for line in aims(case, records) if isinstance(case, Case) else ():
        print(line)
    sys.stdout.flush()


def show_tables(records: list[Record]) -> None:
    """Tables of any records, in their order."""
    for _, group in groupby(records, key=lambda r: (r.case, r.size, r.dtype, r.device)):
        print_table(list(group))


def failed(records: list[Record]) -> list[str]:
    """Variants of ours whose gate is red."""
    return [f"{r.case} {r.size} {r.variant}" for r in records if r.gate == "fail" and r.ours]


def main(argv: list[str] | None = None, cases: Sequence[str] | None = None, prog: str = "benchmarks.run") -> int:
    """Run, print, write; 1 when a variant of ours fails its gate, 2 for bad options.

    Args:
        cases: the cases of a module that is run by itself; None takes them from the command line.
    """
    parser = parser_of(prog, __doc__, on_device=True)
    if cases is None:
        parser.add_argument("cases", nargs="*", default=["all"], help="names, or all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--sizes", "--shape", nargs="+", default=[], help="labels; default: those of the device")
    parser.add_argument("--quick", action="store_true", help="the small sizes of `pytest --benchmark`")
    parser.add_argument("--variants", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds after a warm-up round")
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    synchronise(options.device)
    how = Measuring(
        options.variants,
        options.quick,
        options.repeats,
        memory=not options.no_memory,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )
    try:
        records = run(
            options.cases if cases is None else cases,
            device=options.device,
            dtype=options.dtype,
            sizes=options.sizes,
            how=how,
            path=options.json,
            show=show_tables,
        )
    except ValueError as error:
        parser.error(str(error))
    return int(bool(failed(records)))


if __name__ == "__main__":
    sys.exit(main())
