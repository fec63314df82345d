"""Matrix products that keep fp32 results, whatever the operands are, on the fastest library each device has.

CUDA: cuBLAS through `torch.mm(..., out_dtype=torch.float32)`. CPU: `torch.mm` is MKL, which runs its AVX2 kernels on
processors that are not Intel's; oneDNN, which also ships inside torch, picks AVX-512 kernels wherever the processor
has them (measured on an AMD EPYC: 245 against 107 GFLOP/s per core in fp32, same precision).
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


@cache
def has_onednn_fp32() -> bool:
    """Whether fp32 products go to oneDNN: an x86 build with it, a processor with AVX-512, and torch's op answers."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and onednn_agrees()
    )


def onednn_agrees() -> bool:
    """Whether a small product by torch's private op for oneDNN is that of `torch.mm`.

    Another release of torch may lack the op, take other arguments or mean something else by them. Then every product
    is `torch.mm`'s, which is said once.
    """
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(shape, generator=generator) for shape in ((32, 24), (16, 24), (16,)))
    cases = ((a, b, bias), (a, b, None), (a.t(), b.new_ones(16, 32), None))  # as `cpu_nt` and `cpu_tn` call it
    try:
        with torch.no_grad():
            got = [_onednn(*case) for case in cases]
    except (AttributeError, RuntimeError, TypeError) as error:
        log.warning("torch %s: oneDNN's product is not to be had (%s); torch.mm is taken", torch.__version__, error)
        return False
    want = [x @ y.t() if z is None else torch.addmm(z, x, y.t()) for x, y, z in cases]
    if all(g.shape == w.shape and torch.allclose(g, w, rtol=1e-4, atol=1e-4) for g, w in zip(got, want)):
        return True
    log.warning("torch %s: oneDNN's product is another than torch.mm's, which is taken", torch.__version__)
    return False


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a (M, K) @ b (N, K)ᵀ + bias (N,) in fp32 by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@cache
def has_fast_bf16() -> bool:
    """Whether `torch.mm` of bf16 operands is faster than of fp32 ones: a processor with bf16 instructions."""
    if not torch.backends.mkldnn.is_available():
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Logits, statistics and gradient sums are fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient made in the forward waits in for the incoming one: fp16 would lose what loss scaling lifts."""
    return torch.float32 if dtype == torch.float16 else dtype


def cpu_nt(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (N, K)ᵀ + bias (N,) on the CPU, in one dtype, fp32 or fp64; operands may be transposed views.

    M may be another one in every call: oneDNN sees few different ones.
    """
    if a.dtype == torch.float32 and has_onednn_fp32():
        return _onednn(_padded(a), b, bias)[: a.shape[0]]
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())


def cpu_tn(a: Tensor, b: Tensor) -> Tensor:
    """a (K, M)ᵀ @ b (K, N) on the CPU, in one dtype, fp32 or fp64; K may be another one in every call."""
    if a.dtype == torch.float32 and has_onednn_fp32():
        return _onednn(_padded(a).t(), _padded(b).t(), None)
    return a.t() @ b


def _padded(x: Tensor) -> Tensor:
    """Zero rows below x, up to one of 16 to 32 numbers of rows per octave.

    oneDNN keeps code and plans, a quarter of a MiB and more, for each of the last 1,024 shapes in two caches: packs of
    ever different lengths would fill hundreds of MiB before memory stops growing.
    """
    rows = x.shape[0]
    missing = -rows % (1 << max(rows.bit_length() - 5, 5))
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def mm_f32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a (M, K) @ b (K, N) in fp32 from fp32, bf16 or fp16 operands; out (M, N) fp32 may have padded rows."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def mm_f32_add(total: Tensor, a: Tensor, b: Tensor, alpha: float, add: bool = True) -> None:
    """total += alpha * a (M, K) @ b (K, N), with total (M, N) fp32 in place; without `add`, total is not read.

    Without `add` total may also be of the operands' dtype: one product rounds once, a running sum would every time.
    """
    beta = 1.0 if add else 0.0
    if a.dtype == torch.float32 or (a.is_cuda and a.dtype == total.dtype):
        torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)
    elif total.dtype == torch.float32:
        torch.addmm(total, a.float(), b.float(), beta=beta, alpha=alpha, out=total)
    else:
        total.copy_((a.float() @ b.float()).mul_(alpha))
