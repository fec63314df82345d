"""Rungs from the plain Trainer way to all switches: step time, memory and correctness of each, on the same documents.

    python -m benchmarks.studies.ladder --device cpu --json benchmarks/results/cpu/ladder.json
    python -m benchmarks.studies.ladder --device cuda --json ladder.json  (NLLB-600M + Llama-3-8B shapes)

plain: Hugging Face's models on padded batches, a pass of the teacher and one of the student, a 4-D mask, logits of
every slot, the loss op by op, AdamW. On the CPU every other rung is plain with one change, or with several ("+"). On a
GPU two models are climbed: plain, packed, fused loss, Liger layers, compile, fp8, with the joint pass tried on the
packed rung; and from the fused loss on the switches for memory, the last of them together.

A step is forward, backward and optimizer. `static` is what lies in memory between steps (weights, optimizer state),
`peak` what a step needs on top; on the CPU each is measured in a process of its own. A rung is correct where its loss
and gradients are those of the plain one in fp64 on the first texts of the batch (on a GPU, of a small model), within
the tolerance of its dtype; with quantised weights, those of the plain one over the dequantised weights. On a GPU they
are also compared with the plain rung's own on the whole batch ("whole").
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from mtllm_fast.models.frozen import KINDS

from ..apart import apart
from ..cases.steps import REAL, SMALL, Problem, exact, make, result, shape, small
from ..common import (
    DTYPES,
    Record,
    interleaved,
    parser_of,
    peak_incremental_mib,
    record_here,
    relative_error,
    timed_once,
    write,
)
from ..registry import Size
from .ladder_rungs import Prepared, Rung, forward_backward, gate, memory_here, missing, prepare, reference

Log = Callable[[str], None]
SIZES: dict[str, dict[str, Size]] = {
    "cpu": {
        "NLI": {"lengths": "NLI", "count": 10},
        "web text": {"lengths": "web text", "count": 3},
    },
    # 8,500 tokens: what a step of a real run has and what fills a GPU; then a third of it, which the plain way can hold
    "cuda": {
        "web text, 24 texts": {"lengths": "web text", "count": 24, **REAL},
        "web text": {"lengths": "web text", "count": 8, **REAL},
    },
    "quick": {"tiny": {**SMALL, "kl": 0.5}},
}

BF16 = {"bf16": True, "base_weights": "bf16"}
FAST = {**BF16, "compile": True}
LIGHT = {"bf16": True, "base_weights": "nf4", "checkpointing": "full", "optim": "adamw_8bit"}
ALONE = (
    Rung("plain"),
    Rung("packed", packed=True),
    Rung("packed + joint", packed=True, joint=True, below="packed"),
    Rung("fused loss", fused=True),
    Rung("bf16 weights", switches=BF16),
    Rung("int8 weights", switches={"base_weights": "int8"}),
    Rung("nf4 weights", switches={"base_weights": "nf4"}),
    Rung("checkpointing, full", switches={"checkpointing": "full"}),
    Rung("checkpointing, half", switches={"checkpointing": "budget"}, budget=0.5),
    Rung("compile", switches={"compile": True}),
    Rung("8-bit AdamW", switches={"optim": "adamw_8bit"}),
    Rung("packed + fused loss", packed=True, fused=True, below="packed"),
    Rung("all for speed", packed=True, fused=True, switches=FAST, below="packed + fused loss"),
    Rung("all for memory", packed=True, fused=True, switches=LIGHT, below="packed + fused loss"),
)


def _fused(name: str, below: str, budget: float = 0.0, **switches: Any) -> Rung:
    return Rung(name, packed=True, fused=True, switches={**BF16, **switches}, budget=budget, below=below)


HAS_LIGER = find_spec("liger_kernel") is not None

# on a GPU: rungs that are climbed on one model, in a process of their own
CLIMBS = (
    (
        Rung("plain", switches=BF16),
        Rung("packed", packed=True, switches=BF16),
        Rung("packed + joint", packed=True, joint=True, switches=BF16, below="packed"),
        _fused("fused loss", "packed"),
        _fused("Liger layers", "fused loss", liger=True),
        _fused("compile", "Liger layers", liger=HAS_LIGER, compile=True),
        _fused("fp8", "compile", liger=HAS_LIGER, compile=True, base_weights="fp8"),
    ),
    (
        _fused("8-bit AdamW", "fused loss", optim="adamw_8bit"),
        _fused("checkpointing, half", "fused loss", 0.5, checkpointing="budget"),
        _fused("checkpointing, full", "fused loss", checkpointing="full"),
        _fused("all for memory", "checkpointing, full", **LIGHT),
    ),
)


def record_of(rung: Rung, p: Problem, device: str, size: str, dtype: str) -> Record:
    ours = rung.packed or rung.fused or rung.name != "plain"
    return record_here("ladder", shape(p), dtype, device, rung.name, size=size, ours=ours)


def run_cpu(size: str, rungs: Sequence[Rung], repeats: int, log: Log, options: Size | None = None) -> list[Record]:
    """Records of all rungs at one size, each on a model of its own, side by side."""
    options = options or SIZES["cpu"][size]
    plain = make(**options, dtype=torch.float32, device="cpu")
    want = exact(small(plain))
    ready: dict[str, Prepared] = {}
    records: dict[str, Record] = {}
    for rung in rungs:
        if why := missing(rung, "cpu"):
            log(f"{size} {rung.name}: left out, {why}")
            continue
        one = prepare(rung, make(**options, dtype=torch.float32, device="cpu"), "cpu")
        record = records[rung.name] = record_of(rung, plain, "cpu", size, "fp32")
        mine = small(one.problem)
        right = reference(rung, small(plain), mine) if rung.base in KINDS else want
        record.gate, record.gate_detail = gate(rung, mine, right)
        log(f"{size} {rung.name}: gate {record.gate} {record.gate_detail}")
        if record.gate == "pass":
            ready[rung.name] = one
        else:
            record.notes = "wrong result: no speed is reported"
    for name, values in interleaved({name: one.step for name, one in ready.items()}, "cpu", repeats, log).items():
        records[name].timed(values)
    names = list(ready)
    ready.clear()
    gc.collect()
    for rung in rungs:
        if rung.name in names:
            static, peak = apart("forkserver", memory_here, rung, options, torch.get_num_threads())
            records[rung.name].static_mib, records[rung.name].peak_incremental_mib = static, peak
            log(f"{size} {rung.name}: static {static:.0f} MiB, peak {peak:.0f} MiB")
    return list(records.values())


def climb(
    rungs: Sequence[Rung],
    options: Size,
    device: str,
    repeats: int,
    before: list[Record],
    plain: dict[str, NDArray[Any]] | None,
    path: Path | None,
    size: str = "",
) -> tuple[list[Record], dict[str, NDArray[Any]] | None]:
    """Records of rungs climbed on one model, and the gradients of the first one that ran on the whole batch.

    Those are numpy arrays: a tensor that crosses a pipe needs its sender alive until it is read.

    Args:
        before, path: all records so far are written to `path` after every rung.
    """
    dtype = "bf16"
    build = {"dtype": DTYPES[dtype], "device": device}
    base, tried = (make(**{**SMALL, "kl": 0.5}, **build) for _ in range(2))
    want, large = exact(base), make(**options, **build)
    records: list[Record] = []
    done: dict[str, Any] = {}
    for rung in rungs:
        record = record_of(rung, large, device, size or str(options["lengths"]), dtype)
        records.append(record)
        if why := missing(rung, device):
            record.notes = why
        else:
            try:
                torch.compiler.reset()
                mine = prepare(rung, tried, device, done)
                right = reference(rung, base, mine.problem) if rung.base in KINDS else want
                record.gate, record.gate_detail = gate(rung, mine.problem, right)
                ready = prepare(rung, large, device, done)
                done = rung.switches
                got = {k: v.float().cpu() for k, v in result(large, forward_backward(rung, large)).items()}
                plain = {k: v.numpy() for k, v in got.items()} if plain is None else plain
                record.gate_detail |= {
                    f"{key}, whole": relative_error(got[key], torch.from_numpy(plain[key])) for key in plain
                }
                if record.gate == "pass":
                    ready.step()
                    record.timed([timed_once(ready.step, device) for _ in range(repeats)])
                    record.static_mib = ready.static_mib()
                    record.peak_incremental_mib = peak_incremental_mib(ready.step, device)
                else:
                    record.notes = "wrong result: no speed is reported"
            except torch.OutOfMemoryError:
                record.notes = "out of memory"
            except Exception as error:  # a rung that breaks must not hide those after it
                record.notes = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            large.model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
        say(f"{rung.name}: {record.time_ms} ms, {record.peak_incremental_mib} MiB, gate {record.gate} {record.notes}")
        if path:
            write(path, [*before, *records])
    return records, plain


def run_climbs(
    device: str, repeats: int, path: Path | None = None, names: Sequence[str] = (), quick: bool = False
) -> list[Record]:
    """Records of all climbs. Each has its own process: Liger's layers stay in a process for good.

    Args:
        names: rungs to climb, besides plain; empty for all.
    """
    records: list[Record] = []
    climbs = [[rung for rung in rungs if not names or rung.name in ("plain", *names)] for rungs in CLIMBS]
    for size, options in SIZES["quick" if quick else "cuda"].items():
        plain = None
        for rungs in filter(None, climbs):
            found, plain = apart("spawn", climb, rungs, options, device, repeats, records, plain, path, size)
            records += found
    return records


def say(text: str) -> None:
    """A line about what is going on."""
    print(text, file=sys.stderr, flush=True)


def print_table(records: list[Record], rungs: Sequence[Rung]) -> None:
    """One size: time, ratio to plain and to the rung below, memory, error."""
    by_name = {r.variant: r for r in records}
    first = records[0]
    print(f"\nladder, {first.size}  {first.shape}  {first.device}  commit {first.commit}")
    line = "{:22} {:>9} {:>9} {:>9} {:>8} {:>11} {:>9} {:>9} {:>9}"
    print(line.format("rung", "step ms", "x plain", "x below", "texts/s", "static MiB", "peak MiB", "x plain", "error"))

    def ratio(a: float | None, b: float | None) -> str:
        return f"{a / b:.2f}" if a and b else "-"

    for rung in rungs:
        r = by_name.get(rung.name)
        if r is None:
            continue
        plain, below = by_name.get("plain"), by_name.get(rung.below)
        worst = max((v for k, v in r.gate_detail.items() if not k.endswith(", whole")), default=None)
        print(
            line.format(
                r.variant,
                f"{r.time_ms:.0f}" if r.time_ms else "-",
                ratio(r.time_ms, plain.time_ms if plain else None),
                ratio(r.time_ms, below.time_ms if below else None),
                f"{1e3 * r.shape['B'] / r.time_ms:.1f}" if r.time_ms else "-",
                f"{r.static_mib:.0f}" if r.static_mib else "-",
                f"{r.peak_incremental_mib:.0f}" if r.peak_incremental_mib else "-",
                ratio(r.peak_incremental_mib, plain.peak_incremental_mib if plain else None),
                f"{worst:.0e}" if worst is not None else "-",
            )
            + (f"  {r.notes}" if r.notes else "")
        )
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 where a rung is not correct."""
    parser = parser_of("benchmarks.studies.ladder", __doc__, on_device=True)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after a warm-up round")
    parser.add_argument("--rungs", nargs="+", default=[], help="names, besides plain; default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny size")
    parser.add_argument("--climb", action="store_true", help="climb as on a GPU; on the CPU with --quick")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    climbs = options.climb or options.device == "cuda"
    if climbs and options.device == "cpu" and not options.quick:
        parser.error("--climb: on the CPU only with --quick; the models of the whole climb are a GPU's")
    known = [rung.name for rungs in (CLIMBS if climbs else (ALONE,)) for rung in rungs]
    if unknown := sorted(set(options.rungs) - set(known)):
        parser.error(f"--rungs {unknown[0]!r}: there are {', '.join(known)}")
    records: list[Record] = []
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    if climbs:
        records = run_climbs(options.device, options.repeats, options.json, options.rungs, options.quick)
        for _, found in groupby(records, key=lambda r: r.size):
            print_table(list(found), [rung for rungs in CLIMBS for rung in rungs])
    else:
        rungs = [rung for rung in ALONE if not options.rungs or rung.name in ("plain", *options.rungs)]
        for size, what in SIZES["quick" if options.quick else "cpu"].items():
            found = run_cpu(size, rungs, options.repeats, say, what)
            print_table(found, rungs)
            records += found
            if options.json:
                write(options.json, records)
    return int(any(r.gate == "fail" for r in records))


if __name__ == "__main__":
    sys.exit(main())
