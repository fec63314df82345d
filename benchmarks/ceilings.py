"""What this device can do at most, measured: bytes per second of a copy, FLOP/s of a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from mtllm_fast.kernels.gemms import cpu_nt, has_onednn_fp32

from .common import synchronise

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
SIDE = {"cpu": 2048, "cuda": 8192}


def best(run: Callable[[], object], device: str, seconds: float = 0.5, least: int = 5) -> float:
    """Shortest of at least `least` runs, in seconds: a ceiling is what the device reaches when nothing disturbs it."""
    run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def measure(device: str) -> dict[str, float]:
    """Ceilings of `device` with the threads that torch now has.

    copy: bytes read plus bytes written per second, over a tensor larger than the caches.
    gemm_fp32, gemm_bf16: FLOP/s of the best library in this process. On the CPU also gemm_fp32_torch (`torch.mm`) and
    gemm_fp32_onednn, which our CPU paths use: where they differ, that much of a gain is the library's.
    """
    half = COPY_BYTES[device] // 2
    source, target = (torch.empty(half, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    found = {"copy": 2 * half / best(lambda: target.copy_(source), device)}
    side = SIDE[device]
    flops = 2.0 * side**3
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    found["gemm_fp32"] = flops / best(lambda: a @ b, device)
    if device == "cpu":
        found["gemm_fp32_torch"] = found["gemm_fp32"]
        if has_onednn_fp32():
            found["gemm_fp32_onednn"] = flops / best(lambda: cpu_nt(a, b), device)
            found["gemm_fp32"] = max(found["gemm_fp32_torch"], found["gemm_fp32_onednn"])
    a, b = a.bfloat16(), b.bfloat16()
    found["gemm_bf16"] = flops / best(lambda: a @ b, device)
    return found


def floor_ms(work_bytes: float, flops: float, dtype: str, ceilings: dict[str, float]) -> float:
    """Time below which no implementation gets: the slower of moving the bytes and of the arithmetic."""
    rate = ceilings.get(f"gemm_{dtype}") or ceilings["gemm_bf16"]
    return 1e3 * max(work_bytes / ceilings["copy"], flops / rate)


def describe(ceilings: dict[str, float]) -> str:
    """One line for a table's head."""
    rates = ", ".join(f"{k.removeprefix('gemm_')} {v / 1e9:,.0f}" for k, v in ceilings.items() if k != "copy")
    return f"ceilings measured in this run: copy {ceilings['copy'] / 1e9:,.1f} GB/s; GEMM GFLOP/s {rates}"
