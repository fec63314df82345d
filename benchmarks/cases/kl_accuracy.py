"""Error of the KL's gradient against fp64, at the distances from the teacher that a distillation passes through.

    python -m benchmarks.cases.kl_accuracy [--json F.json]

bf16 states and head, V=32000, D=1024. The student is moved towards the teacher until the mean KL in fp64 is the wanted
one; every variant then sees the same bf16 numbers, so all of its error is its own arithmetic. Errors are
||dh - dh_fp64|| / ||dh_fp64||, of the bf16 gradient that autograd delivers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from mtllm_fast.kernels.linear_kl import reference
from torch import Tensor

from ..common import Record, parser_of, record_here, relative_error, write
from ..registry import Study, register
from . import linear_kl_variants as v
from .linear_kl_variants import Problem, make_problem

KLS = (0.86, 0.10, 0.009, 0.001)
AIM = 0.003  # of the difference form, everywhere


def fp64_gradient(problem: Problem) -> tuple[float, Tensor]:
    """Mean KL and its gradient from the same (already rounded) numbers."""
    h = problem.h_s.detach().double().requires_grad_()
    total, count, _ = reference(h, problem.w.double(), problem.h_t.double())
    (total / count).backward()
    assert h.grad is not None
    return float(total.detach() / count), h.grad


def problem_at(kl: float, rows: int, width: int, vocab: int, device: str) -> Problem:
    """A problem whose mean KL is `kl` within 1 %."""
    low, high = 0.0, 4.0
    base = make_problem(rows, width, vocab, torch.float32, device, noise=1.0)
    delta = base.h_s.detach() - base.h_t
    teacher, head = base.h_t.bfloat16(), base.w.bfloat16()
    teacher64, head64 = teacher.double(), head.double()
    for _ in range(40):
        noise = (low + high) / 2
        student = (teacher.float() + noise * delta).bfloat16()
        with torch.no_grad():
            total, count, _ = reference(student.double(), head64, teacher64)
        got = float(total / count)
        if abs(got - kl) <= 0.01 * kl:
            break
        low, high = (noise, high) if got < kl else (low, noise)
    return Problem(student.requires_grad_(), teacher, head)


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.half().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].half().float()


def fp16_logits(p: Problem) -> Tensor:
    """Logits rounded to fp16, the rest in fp32 (emulated: the GEMM itself is fp32)."""
    w = p.w.float()
    with torch.no_grad():
        teacher = torch.log_softmax((p.h_t.float() @ w.t()).half().float(), -1)
    student = torch.log_softmax(_Half.apply(p.h_s.float() @ w.t()), -1)
    loss = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) / p.rows
    loss.backward()
    return loss.detach()


def gpu_difference(p: Problem) -> Tensor:
    """The CUDA path. Without a GPU its arithmetic in torch: fp32 logits, p_s - p_t rounded to bf16 before the dX GEMM.

    (Not the Triton interpreter: it truncates fp32 to bf16 where the hardware rounds, which doubles that error.)
    """
    if p.w.is_cuda:
        return v.ours(p)
    with torch.no_grad():
        w = p.w.float()
        log_s, log_t = (torch.log_softmax(h.float() @ w.t(), -1) for h in (p.h_s, p.h_t))
        dh = (log_s.exp() - log_t.exp()).bfloat16().float() @ w
        p.h_s.grad = (dh.bfloat16().float() / p.rows).bfloat16()
        return (log_t.exp() * (log_t - log_s)).sum() / p.rows


def gpu_moments(p: Problem) -> Tensor:
    """The moment form on CUDA; without a GPU its arithmetic in torch: exp(z - max) rounded to bf16, cached and not."""
    if p.w.is_cuda:
        return v.ours_moments(p)
    with torch.no_grad():
        w = p.w.float()

        def moments(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z = h.float() @ w.t()
            e = (z - z.amax(1, keepdim=True)).exp().bfloat16().float()
            return e @ w / e.sum(1, keepdim=True), z.logsumexp(1), (z.softmax(1) * z).sum(1)

        m_s, lse_s, _ = moments(p.h_s)
        m_t, lse_t, z_t = moments(p.h_t)
        p.h_s.grad = ((m_s - m_t).bfloat16().float() / p.rows).bfloat16()
        return (lse_s - (m_t * p.h_s.float()).sum(1) - (lse_t - z_t)).sum() / p.rows


VARIANTS: dict[str, Callable[[Problem], Tensor]] = {
    "ours difference": v.ours,
    "ours difference, GPU arithmetic": gpu_difference,
    "ours moments": v.ours_moments,
    "ours moments, GPU arithmetic": gpu_moments,
    "ours moments, bf16 cache": partial(v.ours_moments, dtype=torch.bfloat16),
    "unfused bf16": v.unfused,
    "unfused bf16 logits, fp32 after": v.unfused_upcast,
    "fp16 logits, fp32 after": fp16_logits,
}
if find_spec("liger_kernel") is not None:
    VARIANTS["liger chunked"] = v.liger_chunked


def run(
    device: str = "cpu",
    repeats: int = 0,
    memory: bool = False,
    quick: bool = False,
    rows: int = 64,
    width: int = 1024,
    vocab: int = 32000,
) -> list[Record]:
    """Records of every variant at every distance; the difference form's gate asks for an error of at most `AIM`."""
    if quick:
        width, vocab = 256, 4000
    records: list[Record] = []
    shape = {"T": rows, "D": width, "V": vocab}
    for kl in KLS:
        problem = problem_at(kl, rows, width, vocab, device)
        exact, gradient = fp64_gradient(problem)
        for name, variant in VARIANTS.items():
            problem.h_s.grad = None
            loss = float(variant(problem))
            assert problem.h_s.grad is not None
            error = relative_error(problem.h_s.grad, gradient)
            aimed = name.startswith("ours difference")
            record = record_here("kl_accuracy", shape, "bf16", device, name)
            record.size, record.ours = f"KL {kl:.2g}", name.startswith("ours")
            record.gate = ("pass" if error <= AIM else "fail") if aimed else "none"
            record.gate_detail = {"gradient": error, "loss": abs(loss - exact) / exact}
            record.kl = exact
            records.append(record)
    return records


register(
    Study(
        name="kl_accuracy",
        about="error of the KL's gradient against fp64, in bf16, at four distances from the teacher",
        run=run,
        sources=("kernels/linear_kl*.py", "kernels/moments*.py", "kernels/gemms.py", "kernels/tiles.py"),
    )
)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when the difference form misses its aim."""
    parser = parser_of("benchmarks.cases.kl_accuracy", __doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--quick", action="store_true", help="a tiny size")
    options = parser.parse_args(argv)
    sizes = {"rows": options.rows, "width": options.width, "vocab": options.vocab}
    records = run(options.device, quick=options.quick, **sizes)
    first = records[0]
    print(f"relative gradient error against fp64, bf16 inputs, {first.shape}, {first.device}, {first.commit}")
    print(f"{'':34}" + "".join(f"{size:>12}" for size in dict.fromkeys(r.size for r in records)))
    for name in VARIANTS:
        errors = [r.gate_detail["gradient"] for r in records if r.variant == name]
        print(f"{name:34}" + "".join(f"{100 * e:10.2f} %" for e in errors))
    if options.json:
        write(options.json, records)
    return int(any(r.gate == "fail" for r in records))


if __name__ == "__main__":
    sys.exit(main())
