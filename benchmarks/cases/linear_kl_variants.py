"""The variants that the case `linear_kl` and the study `kl_accuracy` compare: ours and the baselines.

Every variant is a function of one `Problem` that leaves `problem.h_s.grad` and returns the mean loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from mtllm_fast.kernels import TeacherMoments, linear_kl, teacher_moments
from mtllm_fast.kernels.gemms import cpu_nt, mm_f32
from mtllm_fast.kernels.tiles import LINEAR_KL, LINEAR_KL_CPU, architecture
from torch import Tensor


@dataclass
class Problem:
    """A teacher, a student near it, one shared head; forward KL at temperature 1, mean over the rows of weight 1."""

    h_s: Tensor  # (T, D), requires a gradient
    h_t: Tensor  # (T, D)
    w: Tensor  # (V, D), requires a gradient when the head trains
    mask: Tensor | None = None  # (T,) bool, rows that count
    backward: bool = True
    moments: TeacherMoments | None = None
    valid: int = field(init=False)  # rows that count, known to the host
    logit_gradient: Tensor | None = None  # what `gemms` multiplies in the place of p_s - p_t, made once

    def __post_init__(self) -> None:
        self.valid = self.rows if self.mask is None else int(self.mask.sum())

    @property
    def rows(self) -> int:
        return self.h_s.shape[0]

    def cached_moments(self, dtype: torch.dtype | None = None) -> TeacherMoments:
        if self.moments is None:
            self.moments = teacher_moments(self.h_t, self.w)
        return self.moments.to(dtype=dtype)

    def finish(self, loss: Tensor) -> Tensor:
        """Backward, unless only the forward is timed."""
        if self.backward:
            loss.backward()
        return loss.detach()


def make_problem(
    rows: int,
    width: int,
    vocab: int,
    dtype: torch.dtype,
    device: str,
    *,
    noise: float = 0.1,
    spread: float = 3.0,
    masked: float = 0.0,
    train_head: bool = False,
    seed: int = 0,
) -> Problem:
    """Random states whose logits have the standard deviation `spread`; the student's differ by `noise`, relative.

    Head rows differ in norm by a factor of three, so that rows are peaked over part of the vocabulary. `masked` is the
    share of rows that do not count. Made on the device: half a billion numbers take a CPU core five seconds.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    w = normal(vocab, width).mul_(0.5 + uniform(vocab, 1)).mul_(spread / width**0.5)
    h_t = normal(rows, width)
    h_s = h_t + noise * normal(rows, width)
    mask = uniform(rows) >= masked if masked else None
    w = w.to(device, dtype).requires_grad_(train_head)
    return Problem(h_s.to(device, dtype).requires_grad_(), h_t.to(device, dtype), w, mask)


def ours(p: Problem) -> Tensor:
    """Difference form."""
    total, _ = linear_kl(p.h_s, p.w, p.h_t, row_weight=p.mask, num_valid=p.valid)
    return p.finish(total / p.valid)


def ours_moments(p: Problem, dtype: torch.dtype | None = None) -> Tensor:
    """Moment form with a teacher cached in fp32, or in `dtype`."""
    total, _ = linear_kl(p.h_s, p.w, teacher=p.cached_moments(dtype), row_weight=p.mask, num_valid=p.valid)
    return p.finish(total / p.valid)


def ours_moments_uncached(p: Problem) -> Tensor:
    """Moment form including the teacher's part: what a first epoch costs."""
    total, _ = linear_kl(p.h_s, p.w, p.h_t, form="moments", row_weight=p.mask, num_valid=p.valid)
    return p.finish(total / p.valid)


def _kl(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of the KL over rows of log-probabilities."""
    if mask is None:
        return F.kl_div(student, teacher, reduction="sum", log_target=True)
    values = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return values.masked_fill(~mask, 0.0).sum()


def unfused(p: Problem) -> Tensor:
    """F.linear, log_softmax, kl_div, in the inputs' dtype."""
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(p.h_t, p.w), -1)
    return p.finish(_kl(F.log_softmax(F.linear(p.h_s, p.w), -1), teacher, p.mask) / p.valid)


def unfused_upcast(p: Problem) -> Tensor:
    """Logits in the inputs' dtype, everything after them in fp32: what trainers usually do."""
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(p.h_t, p.w).float(), -1)
    return p.finish(_kl(F.log_softmax(F.linear(p.h_s, p.w).float(), -1), teacher, p.mask) / p.valid)


def chunked(p: Problem, chunk: int = 256) -> Tensor:
    """A plain loop of `unfused_upcast` over row chunks, each with its own backward."""
    total = torch.zeros((), device=p.w.device)
    for start in range(0, p.rows, chunk):
        rows = slice(start, start + chunk)
        with torch.no_grad():
            teacher = F.log_softmax(F.linear(p.h_t[rows], p.w).float(), -1)
        student = F.log_softmax(F.linear(p.h_s[rows], p.w).float(), -1)
        total += p.finish(_kl(student, teacher, None if p.mask is None else p.mask[rows]) / p.valid)
    return total


def labels(p: Problem) -> Tensor:
    """(T,) of 0, and -100 where a row does not count."""
    zeros = torch.zeros(p.rows, dtype=torch.long, device=p.w.device)
    return zeros if p.mask is None else zeros.masked_fill(~p.mask, -100)


def liger_chunked(p: Problem) -> Tensor:
    """Liger's chunked JSD loss at beta 0; `compiled` only where there is a GPU. It always computes dW too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=p.w.is_cuda)
    return p.finish(module(p.h_s, p.w, p.h_t, p.w, labels(p)))


def liger_fused_jsd(p: Problem) -> Tensor:
    """Liger's Triton fused linear JSD at beta 0 (CUDA only)."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    ignored = None if p.mask is None else labels(p)
    return p.finish(LigerFusedLinearJSD(jsd_beta=0.0)(p.h_s, p.w, p.h_t, p.w, ignored))


def liger_fused_kl(p: Problem) -> Tensor:
    """Liger's fused linear KL against target probabilities (CUDA only), the teacher's (T, V) in the inputs' dtype."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    ignored = None if p.mask is None else labels(p)
    return p.finish(LigerFusedLinearKLDivLoss()(p.h_s, p.w, teacher_probabilities(p), ignored))


def teacher_probabilities(p: Problem) -> Tensor:
    """(T, V) in the inputs' dtype, of logits in fp32."""
    with torch.no_grad():
        return F.linear(p.h_t, p.w).float().softmax(-1).to(p.w.dtype)


def trl_chunked_jsd(p: Problem, chunk: int = 256) -> Tensor:
    """The algorithm of TRL's chunked JSD (huggingface/trl#6526) at beta 0, written from its description.

    Rows that count are moved to the front; per chunk of 256 rows both heads are applied and the logits cast to fp32
    inside a gradient checkpoint, so that backward multiplies with the head twice more and keeps states alone.
    """
    from torch.utils.checkpoint import checkpoint

    def divergence(student: Tensor, teacher: Tensor, counts: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(F.linear(teacher, p.w).float(), -1)
        return _kl(F.log_softmax(F.linear(student, p.w).float(), -1), target, counts)

    counts = torch.ones(p.rows, dtype=torch.bool, device=p.w.device) if p.mask is None else p.mask
    order = torch.argsort(counts.logical_not().to(torch.int8), stable=True)[: -(-p.valid // chunk) * chunk]
    student, teacher, counts = p.h_s[order], p.h_t[order], counts[order]
    total = torch.zeros((), device=p.w.device)
    for start in range(0, len(order), chunk):
        rows = slice(start, start + chunk)
        total = total + checkpoint(divergence, student[rows], teacher[rows], counts[rows], use_reentrant=False)
    return p.finish(total / p.valid)


def torch_linear_ce(p: Problem) -> Tensor:
    """torch's own fused head with the teacher's (T, V) probabilities as target, less their entropy."""
    target = teacher_probabilities(p)
    with torch.no_grad():
        entropy = torch.special.entr(target.float()).sum(-1).mean()
    return p.finish(F.linear_cross_entropy(p.h_s, p.w, target) - entropy)


def compiled(p: Problem) -> Tensor:
    """torch.compile of `unfused_upcast`'s forward."""
    with torch.no_grad():
        teacher = _compiled_log_probs(p.h_t, p.w)
    return p.finish(_kl(_compiled_log_probs(p.h_s, p.w), teacher, p.mask) / p.valid)


_COMPILED: list[Callable[[Tensor, Tensor], Tensor]] = []


def _compiled_log_probs(h: Tensor, w: Tensor) -> Tensor:
    if not _COMPILED:
        _COMPILED.append(torch.compile(lambda h, w: F.log_softmax(F.linear(h, w).float(), -1)))
    return _COMPILED[0](h, w)


@torch.no_grad()
def gemms_ours(p: Problem) -> None:
    """The three GEMMs of the difference form as we run them: same library, same chunks, nothing else."""
    if p.w.is_cuda:
        gemms_in_chunks(p, LINEAR_KL.get(architecture(), LINEAR_KL["default"]).chunk_rows)
        return
    sizes = LINEAR_KL_CPU
    for start in range(0, p.rows, sizes.chunk_rows):
        rows = slice(start, start + sizes.chunk_rows)
        x = torch.cat([p.h_s[rows], p.h_t[rows]]).float()
        n = x.shape[0] // 2
        for v in range(0, p.w.shape[0], sizes.block_v):
            block = p.w[v : v + sizes.block_v].float()
            cpu_nt(cpu_nt(x, block)[:n], block.t())


@torch.no_grad()
def gemms_in_chunks(p: Problem, chunk: int) -> None:
    """`gemms_ours` on a GPU, `chunk` row pairs at a time.

    The gradient GEMM multiplies random numbers, made once: of zeros, or of what memory happens to hold, a GPU at its
    power limit multiplies an eighth more in the same time.
    """
    if p.logit_gradient is None:
        generator = torch.Generator(p.w.device).manual_seed(0)
        noise = torch.randn(min(chunk, p.rows), p.w.shape[0], generator=generator, device=p.w.device)
        p.logit_gradient = noise.mul_(1e-3).to(p.w.dtype)
    both = torch.empty(2 * chunk, p.w.shape[0], dtype=torch.float32, device=p.w.device)
    out = torch.empty(chunk, p.w.shape[1], dtype=torch.float32, device=p.w.device)
    for start in range(0, p.rows, chunk):
        x = torch.cat([p.h_s[start : start + chunk], p.h_t[start : start + chunk]])
        n = x.shape[0] // 2
        mm_f32(x, p.w.t(), out=both[: 2 * n])
        mm_f32(p.logit_gradient[:n], p.w, out=out[:n])


def gemms_torch(p: Problem) -> None:
    """The three GEMMs as torch.mm runs them, whole: what unfused PyTorch spends on GEMMs."""
    with torch.no_grad():
        z = torch.mm(p.h_s, p.w.t())
        torch.mm(p.h_t, p.w.t(), out=z)
        torch.mm(z, p.w)
