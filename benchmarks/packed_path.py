"""The fused packed path around the LLM against the padded, unfused chain: encoder states -> embeddings, states -> loss.

    python -m benchmarks.packed_path --device cpu --json benchmarks/results/cpu/packed_path.json

Both sides do forward and backward (weights and prefix of the projection; student states of the loss) and get the same
padded encoder states. Length distributions: SIB-200 and XNLI texts where the data is present (tokens counted as pieces
of at most 4 characters, no tokenizer is needed for that), a long-tail one, and a sweep over the share of padding that
shows the break-even. A variant whose result or gradient misses the fp64 reference gets no time.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mtllm_fast.kernels import distillation_loss, packed_projection
from torch import Tensor

from benchmarks.common import (
    Record,
    commit,
    device_name,
    interleaved,
    peak_incremental_mib,
    percentile,
    relative_error,
    versions,
    write,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATE = {"fp32": 1e-4, "bf16": 2e-2}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZES = {"cpu": (32, 1024, 2048), "cuda": (512, 1024, 4096)}  # sequences, encoder width, LLM width
SHARES = (0.0, 0.1, 0.25, 0.4, 0.5)


def pieces(text: str) -> int:
    """Tokens of a text, roughly: pieces of at most 4 characters, and 2 special tokens."""
    return 2 + sum(-(-len(word) // 4) for word in re.findall(r"\w+|[^\w\s]", text))


def _sib200(count: int) -> list[int]:
    languages = ["swh_Latn", "hau_Latn", "eng_Latn", "deu_Latn"]
    texts = []
    for language in languages:
        with (DATA / "sib200" / language / "test.tsv").open(newline="", encoding="utf-8") as file:
            texts += [row["text"] for row in csv.DictReader(file, delimiter="\t")][: -(-count // len(languages))]
    return [pieces(text) for text in texts[:count]]


def _xnli(count: int) -> list[int]:
    with gzip.open(DATA / "xnli" / "sw" / "test.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for _, line in zip(range(count), file)]
    return [pieces(row[0]) + pieces(row[1]) for row in rows]


def _long_tail(count: int) -> list[int]:
    g = torch.Generator().manual_seed(0)
    return [max(1, int(n)) for n in torch.empty(count).log_normal_(3.2, 0.7, generator=g)]


def _padding(share: float, count: int) -> list[int]:
    """Lengths spread evenly around their mean, with `share` of the padded batch being padding."""
    longest = 64
    return [round(longest * (1 - 2 * share * i / (count - 1))) or 1 for i in range(count)]


def distributions(count: int) -> dict[str, Callable[[], list[int]]]:
    """Lengths by name; data sets only where they are present."""
    found: dict[str, Callable[[], list[int]]] = {}
    if (DATA / "sib200").is_dir():
        found["sib200"] = partial(_sib200, count)
    if (DATA / "xnli").is_dir():
        found["xnli"] = partial(_xnli, count)
    found["long-tail"] = partial(_long_tail, count)
    return found | {f"padding {share:.0%}": partial(_padding, share, count) for share in SHARES}


@dataclass
class Problem:
    """Padded states of both models over one list of lengths, and the packing metadata, made once."""

    lengths: list[int]
    encoder: Tensor  # (B, L, E)
    student: Tensor  # (B, L, D)
    teacher: Tensor  # (B, L_t, D)
    weight: Tensor  # (D, E)
    bias: Tensor  # (D,)
    norm: tuple[Tensor, Tensor]  # (E,), (E,)
    prefix: Tensor  # (1, D)
    cu: Tensor
    cu_t: Tensor
    rows: Tensor  # (T,) rows of the flattened (B, L)
    rows_t: Tensor
    pairs: tuple[Tensor, Tensor]  # packed rows
    packed_student: Tensor
    packed_teacher: Tensor
    direction: Tensor  # (T + B, D)

    @property
    def padding(self) -> float:
        return 1 - sum(self.lengths) / (len(self.lengths) * max(self.lengths))


def make_problem(lengths: list[int], width: int, out: int, dtype: torch.dtype, device: str) -> Problem:
    """Random states; the teacher's sequences are a tenth longer."""
    torch.manual_seed(0)
    other = [max(1, round(n * 1.1)) for n in lengths]
    count = len(lengths)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    def packing(sizes: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([torch.arange(n) + b * max(sizes) for b, n in enumerate(sizes)])
        return torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32).to(device), rows.to(device)

    (cu, rows), (cu_t, rows_t) = packing(lengths), packing(other)
    student, teacher = normal(count, max(lengths), out), normal(count, max(other), out)
    # half of the student's rows have a partner
    pair_s = torch.arange(0, sum(lengths), 2, device=device)
    own = torch.searchsorted(cu[1:].contiguous(), pair_s.int(), right=True)
    pair_t = torch.minimum(cu_t[own].long() + pair_s - cu[own].long(), cu_t[own + 1].long() - 1)
    return Problem(
        lengths, normal(count, max(lengths), width), student, teacher, normal(out, width, scale=width**-0.5),
        normal(out), (normal(width) + 1, normal(width)), normal(1, out), cu, cu_t, rows, rows_t, (pair_s, pair_t),
        student.flatten(0, 1)[rows].contiguous(), teacher.flatten(0, 1)[rows_t].contiguous(),
        normal(sum(lengths) + count, out),
    )  # fmt: skip


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def embeddings_ours(p: Problem) -> tuple[Tensor, ...]:
    """packed_projection: packed embeddings, gradients of weight, bias and prefix."""
    w, b, prefix = _leaf(p.weight), _leaf(p.bias), _leaf(p.prefix)
    y = packed_projection(
        p.encoder, w, b, rows=p.rows, norm="layer", norm_weight=p.norm[0], norm_bias=p.norm[1], scale=0.5,
        cu_seqlens=p.cu, prefix=prefix,
    )  # fmt: skip
    y.backward(p.direction)
    return y.detach(), w.grad, b.grad, prefix.grad  # type: ignore[return-value]


def embeddings_unfused(p: Problem, chosen: bool = False) -> tuple[Tensor, ...]:
    """LayerNorm, Linear, scale and a concatenated prefix over the padded batch."""
    w, b, prefix = _leaf(p.weight), _leaf(p.bias), _leaf(p.prefix)
    h = F.layer_norm(p.encoder, p.encoder.shape[-1:], *p.norm, 1e-5)
    y = F.linear(h, w, b) * 0.5
    y = torch.cat([prefix.expand(y.shape[0], 1, -1), y], 1)
    if not hasattr(p, "padded_direction"):
        p.padded_direction = padded_direction(p)  # type: ignore[attr-defined]
    y.backward(p.padded_direction)  # type: ignore[attr-defined]
    out = y.detach()
    if chosen:
        out = out.flatten(0, 1)[_rows_with_prefix(p)]
    return out, w.grad, b.grad, prefix.grad  # type: ignore[return-value]


def _rows_with_prefix(p: Problem) -> Tensor:
    longest = max(p.lengths) + 1
    rows = [torch.arange(n + 1) + b * longest for b, n in enumerate(p.lengths)]
    return torch.cat(rows).to(p.encoder.device)


def padded_direction(p: Problem) -> Tensor:
    """The incoming gradient of the padded chain: zeros at padding."""
    shape = (len(p.lengths), max(p.lengths) + 1, p.direction.shape[1])
    flat = p.direction.new_zeros(shape).flatten(0, 1)
    flat[_rows_with_prefix(p)] = p.direction
    return flat.view(shape)


def loss_ours(p: Problem) -> tuple[Tensor, ...]:
    """Pooled and paired MSE over packed states in one node."""
    x = _leaf(p.packed_student)
    terms = distillation_loss(
        x, p.packed_teacher, cu_seqlens_s=p.cu, cu_seqlens_t=p.cu_t, paired="mse", rows_s=p.pairs[0],
        rows_t=p.pairs[1], rows_sorted=True,
    )  # fmt: skip
    assert terms.pooled_mse is not None and terms.paired_mse is not None
    total = terms.pooled_mse[0] / terms.pooled_mse[1] + terms.paired_mse[0] / terms.paired_mse[1]
    total.backward()
    return total.detach(), x.grad  # type: ignore[return-value]


def loss_unfused(p: Problem, chosen: bool = False) -> tuple[Tensor, ...]:
    """Masked means and gathered rows of the padded batches, by torch."""
    x = _leaf(p.student)

    def mean(states: Tensor, cu: Tensor) -> Tensor:
        lengths = cu.diff()
        mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        return (states * mask[..., None]).sum(1) / lengths[:, None]

    pooled = F.mse_loss(mean(x, p.cu).float(), mean(p.teacher, p.cu_t).float())
    s = x.flatten(0, 1)[p.rows[p.pairs[0]]]
    t = p.teacher.flatten(0, 1)[p.rows_t[p.pairs[1]]]
    total = pooled + F.mse_loss(s.float(), t.float())
    total.backward()
    assert x.grad is not None
    return total.detach(), (x.grad.flatten(0, 1)[p.rows] if chosen else x.grad)


CASES: dict[str, dict[str, Callable[..., tuple[Tensor, ...]]]] = {
    "states to embeddings": {"ours": embeddings_ours, "unfused": embeddings_unfused},
    "states to loss": {"ours": loss_ours, "unfused": loss_unfused},
}


def gate(case: str, name: str, p: Problem, dtype: str) -> tuple[str, dict[str, float]]:
    """The variant's results against the padded chain in fp64."""
    wide = Problem(**{
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(p).items()
        if k in Problem.__dataclass_fields__
    })  # fmt: skip
    wide.norm = (p.norm[0].double(), p.norm[1].double())
    right = CASES[case]["unfused"](wide, chosen=True)
    got = CASES[case][name](p) if name == "ours" else CASES[case][name](p, chosen=True)
    errors = {str(i): relative_error(a, b) for i, (a, b) in enumerate(zip(got, right))}
    return ("pass" if all(e <= GATE[dtype] for e in errors.values()) else "fail"), errors


def memory_here(case: str, name: str, lengths: list[int], width: int, out: int, dtype: str, device: str) -> float:
    """Peak incremental memory of one step in this process, libraries warmed up on a small problem first."""
    run = CASES[case][name]
    run(make_problem([3, 5], 32, 48, DTYPES[dtype], device))
    problem = make_problem(lengths, width, out, DTYPES[dtype], device)
    if case == "states to embeddings" and name == "unfused":
        problem.padded_direction = padded_direction(problem)  # type: ignore[attr-defined]
    if device == "cpu":
        # give freed heap back to the system: memory that a run finds there would not show in the high-water mark
        ctypes.CDLL(None).malloc_trim(0)
    return peak_incremental_mib(lambda: run(problem), device)


def measure_memory(case: str, name: str, lengths: list[int], width: int, out: int, dtype: str, device: str) -> float:
    """`memory_here`, on the CPU in a process of its own."""
    if device != "cpu":
        return memory_here(case, name, lengths, width, out, dtype, device)
    spec = json.dumps([case, name, lengths, width, out, dtype, device])
    command = [sys.executable, "-m", "benchmarks.packed_path", "--threads", str(torch.get_num_threads())]
    done = subprocess.run(
        [*command, "--memory-of", spec], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def run_all(names: list[str] | None, dtype: str, device: str, repeats: int, memory: bool) -> list[Record]:
    """Every case over every distribution."""
    count, width, out = SIZES[device]
    records: list[Record] = []
    head = ("case", "lengths", "padding", "ours ms", "unfused", "ratio", "MiB", "unfused")
    print("{:21} {:12} {:>7} {:>8} {:>8} {:>6} {:>8} {:>8}".format(*head))
    for lengths_name, lengths_of in distributions(count).items():
        if names and lengths_name not in names:
            continue
        lengths = lengths_of()
        problem = make_problem(lengths, width, out, DTYPES[dtype], device)
        for case, variants in CASES.items():
            shape = {"B": count, "T": sum(lengths), "L": max(lengths), "E": width, "D": out}
            fresh = {}
            for name in variants:
                verdict, errors = gate(case, name, problem, dtype)
                record = Record(f"{case}, {lengths_name}", shape, dtype, device_name(device), name, verdict)
                record.gate_detail, record.versions, record.commit = errors, versions(), commit()
                record.notes = f"padding {problem.padding:.3f}"
                records.append(record)
                if verdict == "pass":
                    fresh[name] = record
            times = interleaved({n: partial(variants[n], problem) for n in fresh}, device, repeats)
            for name, record in fresh.items():
                record.time_ms, record.time_ms_p20, record.time_ms_p80 = (
                    percentile(times[name], q) for q in (0.5, 0.2, 0.8)
                )
                if memory:
                    record.peak_incremental_mib = measure_memory(case, name, lengths, width, out, dtype, device)
            if len(fresh) == 2:
                a, b = fresh["ours"], fresh["unfused"]
                assert a.time_ms is not None and b.time_ms is not None
                peaks = [
                    f"{r.peak_incremental_mib:8.1f}" if r.peak_incremental_mib is not None else "       -"
                    for r in (a, b)
                ]
                print(
                    f"{case:21} {lengths_name:12} {problem.padding:7.1%} {a.time_ms:8.2f} {b.time_ms:8.2f} "
                    f"{a.time_ms / b.time_ms:6.2f} {' '.join(peaks)}",
                    flush=True,
                )
    return records


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 when a variant of ours fails its gate."""
    parser = argparse.ArgumentParser(prog="benchmarks.packed_path", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--lengths", nargs="+", help="length distributions; default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_here(*json.loads(options.memory_of))))
        return 0
    dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    records = run_all(options.lengths, dtype, options.device, options.repeats, not options.no_memory)
    if options.json:
        write(options.json, records)
    return int(any(r.gate == "fail" and r.variant == "ours" for r in records))


if __name__ == "__main__":
    sys.exit(main())
