"""The KL over the LM head, forward + backward, against unfused PyTorch, torch.compile, chunk loops, Liger, torch.

    python -m benchmarks.cases.linear_kl --device cpu --json F.json   (mtllm bench linear_kl)
    python -m benchmarks.cases.linear_kl --predict FILE [H200]  what such a GPU should need, by its floors; not measured

`gemms` and `gemms-torch` are the three matrix products alone, by our library calls and by `torch.mm`: on processors
where `torch.mm` (MKL) is slower than oneDNN, the difference of the two is the library's part of a CPU gain.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from mtllm_fast.kernels.linear_kl import reference
from mtllm_fast.kernels.tiles import LINEAR_KL_CPU
from torch import Tensor

from ..common import Record, versions, write
from ..registry import Case, Size, Variant, Work, register
from ..run import main
from . import linear_kl_variants as v
from .linear_kl_variants import Problem, make_problem

EDGE = 32  # rows at either end of a run whose gradient the gate compares
BLOCK = 512  # rows of fp64 logits at a time
# Ours in 16 bits. The CUDA arithmetic, run in torch, is off by 0.24 % in bf16 (moments 0.45 %, the rounding of exp),
# the baselines by 5 to 10 %.
OURS = {"bf16": 5e-3, "fp16": 2e-3}
MOMENTS = {"bf16": 1e-2, "fp16": 1e-2}
# (GEMMs, bytes per logit that the row kernels move) of ours on a GPU with a frozen head, for predictions.
MOVED = {"ours": (3, 18), "ours-moments": (2, 10), "ours-moments-uncached": (4, 20)}
AIMS = (
    ("ours", "unfused", "time", 0.60),
    ("ours", "unfused", "memory", 0.20),
    ("ours", "liger-chunked", "time", 0.60),
    ("ours", "gemms", "time", 1.35),
    ("ours-moments", "ours", "time", 0.75),
)
GPU_SHAPES = [
    (t, d, vocab)
    for d, vocab in ((2048, 32000), (4096, 128256), (3584, 152064), (2560, 262144))
    for t in (1024, 2048, 4096, 8192, 16384)
]


def make(
    rows: int = 0,
    width: int = 0,
    vocab: int = 0,
    *,
    dtype: torch.dtype,
    device: str,
    states: str = "random",
    **options: Any,
) -> Problem:
    """states "random", or "model": a trained LLM's own states and head, the student's from perturbed embeddings."""
    if states == "random":
        return make_problem(rows, width, vocab, dtype, device, **options)
    from .states import demo_states

    h_s, h_t, w = (x.to(device, dtype) for x in demo_states(rows))
    return Problem(h_s.requires_grad_(), h_t, w)


def step(run: Callable[[Problem], Any], p: Problem) -> dict[str, Tensor]:
    """One step of a variant, gradients fresh."""
    p.h_s.grad = p.w.grad = None
    out = {"loss": run(p)}
    if p.h_s.grad is not None:
        out["gradient"] = p.h_s.grad
    if p.w.grad is not None:
        out["head_gradient"] = p.w.grad
    return out


def edges(p: Problem, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, head gradient, and the gradient of the first and of the last rows."""
    rows = {"first rows": out["gradient"][:EDGE], "last rows": out["gradient"][-EDGE:]}
    return {**{k: x for k, x in out.items() if k != "gradient"}, **rows}


def small(p: Problem) -> Problem:
    """A run over several chunks, the last one not full, whose loss fp64 can afford: on a GPU the whole."""
    rows = p.rows if p.w.is_cuda else min(p.rows, 2 * LINEAR_KL_CPU.chunk_rows + EDGE + 8)
    mask = None if p.mask is None else p.mask[:rows]
    head = p.w.detach().clone().requires_grad_(p.w.requires_grad) if p.w.requires_grad else p.w
    return Problem(p.h_s.detach()[:rows].clone().requires_grad_(), p.h_t[:rows], head, mask)


def exact(p: Problem) -> dict[str, Tensor]:
    """Loss and gradients in fp64: of the states at both ends only, of a head that trains over all rows."""
    w = p.w.detach().double().requires_grad_(p.w.requires_grad)
    first, last = min(EDGE, p.rows), max(0, p.rows - EDGE)
    loss = torch.zeros((), dtype=torch.float64, device=w.device)
    gradient = torch.zeros(p.rows, w.shape[1], dtype=torch.float64, device=w.device)
    for start, stop in pairwise(sorted({0, first, *range(first, last, BLOCK), last, p.rows})):
        needed = start < first or stop > last
        h = p.h_s.detach()[start:stop].double().requires_grad_(needed)
        mask = None if p.mask is None else p.mask[start:stop]
        with torch.set_grad_enabled(needed or w.requires_grad):
            total, _, _ = reference(h, w, p.h_t[start:stop].double(), row_weight=mask)
        loss += total.detach() / p.valid
        if total.requires_grad:
            (total / p.valid).backward()
        if needed:
            gradient[start:stop] = h.grad
    out = {"loss": loss, "gradient": gradient}
    if w.grad is not None:
        out["head_gradient"] = w.grad
    return edges(p, out)


def work(gemms: int, p: Problem) -> Work:
    """`gemms` products of valid rows x D x V (one more for a trained head); states, head and gradients once."""
    gemms += p.w.requires_grad
    width, vocab = p.w.shape[1], p.w.shape[0]
    values = 3 * p.rows * width + vocab * width * (1 + p.w.requires_grad)
    return Work(values * p.w.element_size(), 2.0 * gemms * p.valid * width * vocab)


def frozen(p: Problem) -> bool:
    """The moment form needs a frozen head."""
    return not p.w.requires_grad


def unmasked(p: Problem) -> bool:
    """Class probabilities know no ignored rows."""
    return p.mask is None


def parse(text: str) -> Size:
    """ "ROWSxWIDTHxVOCAB"."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"size {text!r} is not ROWSxWIDTHxVOCAB, e.g. 2048x1024x64000")
    rows, width, vocab = map(int, parts)
    return sized(rows, width, vocab)


def sized(rows: int, width: int, vocab: int, label: str = "", **options: Any) -> Size:
    label = f"{rows}x{width}x{vocab}" + (f", {label}" if label else "")
    return {"label": label, "rows": rows, "width": width, "vocab": vocab, **options}


def _variant(run: Callable[[Problem], Any], **options: Any) -> Variant:
    return Variant(partial(step, run), edges, **options)


def _cached(p: Problem) -> None:
    p.cached_moments()


CASE = Case(
    name="linear_kl",
    about="KL of two LM-head distributions over aligned rows, loss and gradient, forward + backward",
    make=make,
    sizes={
        "quick": (sized(256, 512, 8000), {"label": "model states", "states": "model", "rows": 1024}),
        "cpu": (
            sized(2048, 1024, 64000),
            sized(256, 512, 32000),
            sized(512, 512, 32000),
            sized(1024, 512, 32000),
            sized(1024, 512, 32000, "half masked", masked=0.5),
            sized(512, 512, 32000, "trained head", train_head=True),
            {"label": "model states", "states": "model", "rows": 8192},
        ),
        "cuda": (
            *(sized(t, 4096, 128256) for t in (8192, 2048, 1024, 4096)),
            sized(4096, 2048, 32000),
            sized(2048, 4096, 128256, "half masked", masked=0.5),
            sized(2048, 4096, 128256, "trained head", train_head=True),
        ),
    },
    variants={
        "ours": _variant(v.ours, ours=True, tolerance=OURS),
        "ours-moments": _variant(
            v.ours_moments, ours=True, tolerance=MOMENTS, applies=frozen, work=partial(work, 2), prepare=_cached
        ),
        "ours-moments-uncached": _variant(v.ours_moments_uncached, ours=True, tolerance=MOMENTS, applies=frozen),
        "unfused": _variant(v.unfused),
        "unfused-upcast": _variant(v.unfused_upcast, devices=("cuda",)),
        "compile": _variant(v.compiled, needs=("compiler",)),
        "chunked": _variant(v.chunked),
        "liger-chunked": _variant(v.liger_chunked, needs=("liger_kernel",)),
        "liger-fused": _variant(v.liger_fused_jsd, needs=("liger_kernel",), devices=("cuda",)),
        "liger-kl": _variant(
            v.liger_fused_kl, needs=("liger_kernel.transformers:LigerFusedLinearKLDivLoss",), devices=("cuda",)
        ),
        "chunked JSD (as TRL)": _variant(v.trl_chunked_jsd),
        "torch-linear-ce": _variant(
            v.torch_linear_ce, needs=("torch.nn.functional:linear_cross_entropy",), applies=unmasked
        ),
        "gemms": Variant(v.gemms_ours, gated=False),
        "gemms-torch": Variant(v.gemms_torch, gated=False),
    },
    reference=exact,
    # In bf16 the logit rounding of the baselines is no failure to compute what they say, so the gate asks for the right
    # gradient there, and ours for a good one.
    tolerance={"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1},
    shape=lambda p: {"T": p.rows, "D": p.w.shape[1], "V": p.w.shape[0]},
    warm={"rows": 32, "width": 64, "vocab": 512},
    work=partial(work, 3),
    small=small,
    aims=dict.fromkeys(("2048x1024x64000", "8192x4096x128256"), AIMS),
    sources=("kernels/linear_kl*.py", "kernels/moments*.py", "kernels/gemms.py", "kernels/tiles.py"),
    parse=parse,
)
register(CASE)


def predictions(gpu: str) -> list[Record]:
    """Records of what a GPU of `planning.GPUS` should need, for a reader without one: nothing is measured."""
    from mtllm_fast.planning import presets

    rates = presets.gpu(gpu).rates
    ceilings = {"copy": rates.bytes, "gemm_bf16": rates.flops}
    records = []
    for rows, width, vocab in GPU_SHAPES:
        for name, (gemms, moved) in MOVED.items():
            floor = 2e3 * gemms * rows * width * vocab / rates.flops
            expected = floor + 1e3 * moved * rows * vocab / rates.bytes
            shape = {"T": rows, "D": width, "V": vocab}
            record = Record("linear_kl", shape, "bf16", f"NVIDIA {gpu}", name, "none", floor_ms=floor)
            record.size, record.versions, record.ceilings = f"{rows}x{width}x{vocab}", versions(), ceilings
            record.notes = f"not measured; predicted {expected:.1f} ms"
            records.append(record)
    return records


if __name__ == "__main__":
    if sys.argv[1:2] == ["--predict"]:
        write(Path(sys.argv[2]), predictions(*sys.argv[3:4] or ["H200"]))
    else:
        sys.exit(main(cases=("linear_kl",), prog="benchmarks.cases.linear_kl"))
