"""What this device can do at most, measured: bytes per second of a copy, FLOP/s of a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from mtllm_fast.kernels.gemms import cpu_nt, has_onednn_fp32

from .common import synchronise

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
SIDE = {"cpu": 2048, "cuda": 8192}
START_SIDE = 256


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


def gemm_rate(
    a: torch.Tensor, b: torch.Tensor, product: Callable[[torch.Tensor, torch.Tensor], object], seconds: float = 0.05
) -> float:
    """FLOP/s of `product` on square parts of a and b, the smallest that takes `seconds`, doubled from 256 up to all.

    A CPU without bf16 instructions multiplies in bf16 some hundred times slower than in fp32: the whole matrices would
    take it a minute each, and say nothing that an eighth of them does not.
    """
    side, device = min(START_SIDE, len(a)), a.device.type
    while True:
        x, y = a[:side, :side].contiguous(), b[:side, :side].contiguous()
        taken = best(partial(product, x, y), device, seconds=0.0, least=2)
        if taken >= seconds or side == len(a):
            taken = min(taken, best(partial(product, x, y), device))
            return 2.0 * side**3 / taken
        side = min(2 * side, len(a))


def measure(device: str) -> dict[str, float]:
    """Ceilings of `device` with the threads that torch now has.

    copy: bytes read plus bytes written per second, over a tensor larger than the caches.
    gemm_fp32, gemm_bf16: FLOP/s of the best library in this process. On the CPU also gemm_fp32_torch (`torch.mm`) and
    gemm_fp32_onednn, which our CPU paths use: where they differ, that much of a gain is the library's.
    """
    half = COPY_BYTES[device] // 2
    source, target = (torch.empty(half, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    found = {"copy": 2 * half / best(lambda: target.copy_(source), device)}
    a, b = (torch.randn(SIDE[device], SIDE[device], device=device) for _ in range(2))
    found["gemm_fp32"] = gemm_rate(a, b, torch.mm)
    if device == "cpu":
        found["gemm_fp32_torch"] = found["gemm_fp32"]
        if has_onednn_fp32():
            found["gemm_fp32_onednn"] = gemm_rate(a, b, cpu_nt)
            found["gemm_fp32"] = max(found["gemm_fp32_torch"], found["gemm_fp32_onednn"])
    found["gemm_bf16"] = gemm_rate(a.bfloat16(), b.bfloat16(), torch.mm)
    return found


def floor_ms(work_bytes: float, flops: float, dtype: str, ceilings: dict[str, float]) -> float:
    """Time below which no implementation gets: the slower of moving the bytes and of the arithmetic."""
    rate = ceilings.get(f"gemm_{dtype}") or ceilings["gemm_bf16"]
    return 1e3 * max(work_bytes / ceilings["copy"], flops / rate)


def describe(ceilings: dict[str, float]) -> str:
    """One line for a table's head."""
    rates = ", ".join(f"{k.removeprefix('gemm_')} {v / 1e9:,.0f}" for k, v in ceilings.items() if k != "copy")
    return f"ceilings measured in this run: copy {ceilings['copy'] / 1e9:,.1f} GB/s; GEMM GFLOP/s {rates}"
