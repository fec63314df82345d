"""The streaming and projection kernels on a GPU against their ceilings: measured copy bandwidth, cuBLAS GEMM alone.

    python -m benchmarks.packed_kernels --json results.json

`packed_projection` at T=16384, 1024 -> 4096 and 2048 -> 4096, gather + LayerNorm + bias + prefix, forward: the Triton
GEMM and the library path (the tile table chooses), eager, and the bare GEMM. Aim: at most 1.10 of the bare GEMM.
`pooled_mse`, `paired_mse` and `distillation_loss` at T=16384, D=4096, bf16: GB/s of the bytes they must move, against
the bandwidth of a copy measured in the same run. Aim: 85 % of it for pooled_mse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from mtllm_fast.kernels import packed_projection, paired_mse, pooled_mse
from mtllm_fast.kernels import packed_projection_launch as launch
from torch import Tensor

from benchmarks.common import Record, commit, device_name, interleaved, percentile, relative_error, versions, write

TOKENS, WIDTH = 16384, 4096
LENGTHS = (32, 4096, 1, 257, 64)  # repeated until the tokens are used up: short texts and a dominant one


def packing(tokens: int) -> Tensor:
    """cu_seqlens of `tokens` tokens on the GPU."""
    ends, index = [0], 0
    while ends[-1] < tokens:
        length = LENGTHS[index] if index < len(LENGTHS) else 32
        ends.append(min(ends[-1] + length, tokens))
        index += 1
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


def measured(
    case: str, shape: dict[str, int], runs: dict[str, Callable[[], object]], gates: dict[str, tuple[str, float]],
    repeats: int, bytes_moved: dict[str, int] | None = None,
) -> list[Record]:  # fmt: skip
    """Interleaved times of all variants whose gate did not fail; 20 calls per timed round."""

    def many(run: Callable[[], object]) -> None:
        for _ in range(20):
            run()

    passed = {name: partial(many, run) for name, run in runs.items() if gates[name][0] != "fail"}
    times = interleaved(passed, "cuda", repeats)
    records = []
    for name in runs:
        verdict, error = gates[name]
        record = Record(case, shape, "bf16", device_name("cuda"), name, verdict)
        record.gate_detail, record.versions, record.commit = {"error": error}, versions(), commit()
        if name in times:
            values = [t / 20 for t in times[name]]
            record.time_ms, record.time_ms_p20, record.time_ms_p80 = (percentile(values, q) for q in (0.5, 0.2, 0.8))
            if bytes_moved:
                record.notes = f"{bytes_moved[name] / record.time_ms / 1e6:.0f} GB/s"
        records.append(record)
        time = f"{record.time_ms:9.4f} ms" if record.time_ms else "        -"
        print(f"{case:34} {shape!s:38} {name:14} {verdict:5} {time}  {record.notes}", flush=True)
    return records


def projection(width: int, repeats: int) -> list[Record]:
    """Forward of gather + LayerNorm + linear + bias + one prefix row per sequence."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS * 2, width, device="cuda").bfloat16()
    rows = torch.randperm(TOKENS * 2, device="cuda")[:TOKENS].sort().values
    w = (torch.randn(WIDTH, width, device="cuda") * width**-0.5).bfloat16()
    b, prefix = torch.randn(WIDTH, device="cuda").bfloat16(), torch.randn(1, WIDTH, device="cuda").bfloat16()
    nw, nb = torch.rand(width, device="cuda").bfloat16() + 0.5, torch.randn(width, device="cuda").bfloat16()
    cu = packing(TOKENS)
    packed = x[rows].contiguous()
    starts = cu[:-1].long() + torch.arange(cu.shape[0] - 1, device="cuda")
    keep = torch.ones(TOKENS + cu.shape[0] - 1, dtype=torch.bool, device="cuda")
    keep[starts] = False
    inside = keep.nonzero().squeeze(1)

    def fused(choice: bool | None) -> Tensor:
        return launch.packed_linear_triton(
            x, rows, w, b, "layer", nw, nb, 1e-5, 1.0, "none", cu, prefix, None, torch.bfloat16, False, choice
        )[0]

    def eager() -> Tensor:
        y = F.linear(F.layer_norm(x[rows], (width,), nw, nb, 1e-5), w, b)
        out = y.new_empty(keep.shape[0], WIDTH)
        out[inside] = y
        out[starts] = prefix
        return out

    runs: dict[str, Callable[[], object]] = {
        "ours": partial(packed_projection, x, w, b, rows=rows, norm="layer", norm_weight=nw, norm_bias=nb,
                        cu_seqlens=cu, prefix=prefix),
        "ours-triton": partial(fused, True),
        "ours-library": partial(fused, False),
        "unfused": eager,
        "gemm": lambda: packed @ w.t(),
    }  # fmt: skip
    exact = F.linear(F.layer_norm(packed.double(), (width,), nw.double(), nb.double(), 1e-5), w.double(), b.double())
    gates = {"gemm": ("none", 0.0)}
    for name, run in runs.items():
        if name != "gemm":
            error = relative_error(run()[inside], exact)  # type: ignore[index]
            gates[name] = ("pass" if error < 1e-2 else "fail", error)
    return measured("packed_projection forward", {"T": TOKENS, "E": width, "D": WIDTH}, runs, gates, repeats)


def streams(repeats: int) -> list[Record]:
    """Bandwidth of the losses over states, forward and forward + backward, against a copy."""
    torch.manual_seed(0)
    s, t = (torch.randn(TOKENS, WIDTH, device="cuda").bfloat16() for _ in range(2))
    x = s.clone().requires_grad_()
    cu = packing(TOKENS)
    rows = torch.arange(TOKENS, device="cuda")
    out = torch.empty_like(s)

    def both(function: Callable[..., tuple[Tensor, Tensor]], *arguments: object, **options: object) -> Tensor:
        x.grad = None
        total, _ = function(x, *arguments, **options)
        total.backward()
        return total

    pooled, paired = (t, cu, cu), (t, rows, rows)
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(s),
        "pooled_mse": lambda: pooled_mse(s, *pooled),
        "pooled_mse rms": lambda: pooled_mse(s, *pooled, norm="rms"),
        "pooled_mse rms+backward": lambda: both(pooled_mse, *pooled, norm="rms"),
        "paired_mse": lambda: paired_mse(s, *paired),
        "paired_mse+backward": lambda: both(paired_mse, *paired, rows_sorted=True),
    }
    one = TOKENS * WIDTH * 2
    moved = {"copy": 2, "pooled_mse": 2, "pooled_mse rms": 2, "pooled_mse rms+backward": 4, "paired_mse": 2,
             "paired_mse+backward": 5}  # fmt: skip
    right = (s.double() - t.double()).square().mean(-1).sum()
    error = relative_error(paired_mse(s, *paired)[0], right)
    means = [F.rms_norm(v.double(), (WIDTH,), eps=1e-6) for v in (s, t)]
    ends = cu.tolist()
    value = sum((means[0][a:b].mean(0) - means[1][a:b].mean(0)).square().mean() for a, b in pairwise(ends) if b > a)
    pooled_error = relative_error(pooled_mse(s, *pooled, norm="rms")[0], torch.as_tensor(value))
    gates = {name: ("pass" if max(error, pooled_error) < 1e-3 else "fail", max(error, pooled_error)) for name in runs}
    gates["copy"] = ("none", 0.0)
    return measured(
        "hidden states", {"T": TOKENS, "D": WIDTH}, runs, gates, repeats, {k: v * one for k, v in moved.items()}
    )


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 when a variant of ours fails its gate."""
    parser = argparse.ArgumentParser(prog="benchmarks.packed_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.packed_kernels needs a GPU", file=sys.stderr)
        return 2
    records = [*projection(1024, options.repeats), *projection(2048, options.repeats), *streams(options.repeats)]
    if options.json:
        write(options.json, records)
    by = {(r.case, r.shape.get("E"), r.variant): r for r in records}
    for width in (1024, 2048):
        ours, gemm = (by["packed_projection forward", width, name].time_ms for name in ("ours", "gemm"))
        if ours and gemm:
            print(f"packed_projection {width} -> {WIDTH}: {ours / gemm:.3f} of the GEMM alone (aim <= 1.10)")
    copy, pooled = (by["hidden states", None, name].time_ms for name in ("copy", "pooled_mse"))
    if copy and pooled:
        print(f"pooled_mse: {copy / pooled:.1%} of copy bandwidth (aim >= 85 %)")
    return int(any(r.gate == "fail" and r.variant.startswith(("ours", "pooled", "paired")) for r in records))


if __name__ == "__main__":
    sys.exit(main())
