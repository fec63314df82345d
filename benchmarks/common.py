"""What every benchmark shares: the record, interleaved timing, peak memory, a correctness gate, versions."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Record:
    """One variant of one case at one size.

    `time_ms` is the whole step (of an op: forward + backward), the median of `round_ms`, whose entry k was taken next
    to entry k of the other variants. Times in ms, memory in MiB, ceilings in bytes/s and FLOP/s; None where not
    measured. `sources` is the hash of `source_files`, by which a published number is known to be out of date.
    """

    case: str
    shape: dict[str, int]
    dtype: str
    device: str
    variant: str
    gate: str  # "pass", "fail", or "none" for a variant that computes no result
    time_ms: float | None = None
    time_ms_p20: float | None = None
    time_ms_p80: float | None = None
    round_ms: list[float] = field(default_factory=list)
    forward_ms: float | None = None
    peak_incremental_mib: float | None = None
    static_mib: float | None = None  # weights and optimizer state, where a case counts them
    floor_ms: float | None = None
    host_syncs: int | None = None
    gate_detail: dict[str, float] = field(default_factory=dict)
    notes: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    size: str = ""
    ours: bool = False
    kl: float | None = None  # nats per row, where the error depends on it
    floor_bytes: float | None = None
    floor_flops: float | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    source_files: tuple[str, ...] = ()
    sources: str = ""

    def timed(self, round_ms: list[float]) -> None:
        """Take over the times of all rounds."""
        self.round_ms = round_ms
        self.time_ms, self.time_ms_p20, self.time_ms_p80 = (percentile(round_ms, q) for q in (0.5, 0.2, 0.8))


def record_here(
    case: str, shape: dict[str, int], dtype: str, device: str, variant: str, gate: str = "none", **known: Any
) -> Record:
    """A record of something that runs now, on `device`, "cpu" or "cuda"."""
    known = {"versions": versions(), "commit": commit(), **known}
    return Record(case, shape, dtype, device_name(device), variant, gate, **known)


def study_record(case: str, shape: dict[str, Any], passed: bool, dtype: str = "fp32", **found: Any) -> dict[str, Any]:
    """A record with a verdict, of a study on this CPU that is more than times: `found` is what it has to say."""
    return {
        "case": case,
        "shape": shape,
        "dtype": dtype,
        "device": device_name("cpu"),
        "variant": "ours",
        "gate": "pass" if passed else "fail",
        **found,
        "versions": versions(),
        "commit": commit(),
    }


def made_here() -> dict[str, Any]:
    """This CPU, and what a result on it can depend on."""
    return {"device": device_name("cpu"), "versions": versions(), "commit": commit()}


def parser_of(module: str, doc: str | None, *, on_device: bool = False) -> argparse.ArgumentParser:
    """A command line that can write its records, with the first line of `doc`.

    Args:
        on_device: it also chooses a device, and how many threads a CPU has.
    """
    parser = argparse.ArgumentParser(prog=module, description=(doc or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records here")
    if on_device:
        here = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", default=here, choices=("cpu", "cuda"))
        parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    return parser


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "liger-kernel", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str:
    """Short hash of the checkout, with "+changes" when tracked files differ from it; elsewhere MTLLM_COMMIT."""

    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        try:
            return subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    head = git("rev-parse", "--short=10", "HEAD")
    if not head:
        return os.environ.get("MTLLM_COMMIT", "")
    return head + ("+changes" if git("status", "--porcelain", "-uno", "--", "../kernels", ".") else "")


def device_name(device: str) -> str:
    """The device in words, as results are filed under."""
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
        return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name()


def folder_name(device: str) -> str:
    """The folder of a device's records in benchmarks/results: "NVIDIA H200" is nvidia-h200, a CPU is cpu."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return "cpu" if device == device_name("cpu") else words


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in fp64; NaN anywhere gives NaN."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(torch.finfo(torch.float64).tiny))


def host_syncs(run: Callable[[], object]) -> int:
    """How often a CUDA step stops the host."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # switching the mode on warns as well, once per process
    return sum("called a synchronizing" in str(w.message) for w in caught)


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed_once(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one run."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    device: str,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
    after_round: Callable[[dict[str, list[float]]], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Times in ms by variant, one of each per round, after one warm-up round; cyclic order, so that no variant always
    follows the same neighbour. `after_round` is called with the times so far."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for round_ in range(repeats + 1):
        for k in range(len(names)):
            name = names[(k + round_) % len(names)]
            elapsed = timed_once(variants[name], device)
            if round_:
                times[name].append(elapsed)
            progress(f"round {round_}/{repeats} {name} {elapsed:.0f} ms")
        if round_:
            after_round(times)
        gc.collect()
    return times


def percentile(values: Sequence[float], q: float) -> float:
    """Linear-interpolation percentile, q in [0, 1]."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def peak_incremental_mib(run: Callable[[], object], device: str) -> float:
    """Memory that `run` needs on top of what is allocated before it.

    CUDA: the allocator's high-water mark. CPU: the process's resident high-water mark (VmHWM, reset through
    /proc/self/clear_refs), so whatever the libraries allocate counts too; call it in a fresh process whose libraries
    are warmed up, or memory that the heap already holds is missed.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # give freed heap back to the system: memory that a run finds there would not show in the high-water mark
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def write(path: Path, records: Sequence[Any]) -> None:
    """Write records (dataclasses or dicts) as a JSON list; who is killed meanwhile leaves the former file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [r if isinstance(r, dict) else asdict(r) for r in records]
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(path)
