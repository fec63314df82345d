"""Packed against padded: states to the LLM's embeddings, and hidden states to losses.

    python -m benchmarks.cases.packed_path --device cpu --json F.json

Forward + backward of everything that a padded batch makes: the unfused chains work on padded (B, L, D) tensors where
the model hands them over padded, or packed op by op; ours works on packed rows. All get the same padded encoder states.
The lengths are those of real texts, and a sweep over the share of padding that shows the break-even.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mtllm_fast.kernels import distillation_loss, packed_projection, paired_mse, pooled_mse
from torch import Tensor

from ..lengths import DISTRIBUTIONS
from ..registry import Case, Size, Variant, Work, register
from ..run import main


@dataclass
class Problem:
    """Padded states of both models over one list of lengths, and the packing metadata, made once."""

    lengths: list[int]
    encoder: Tensor  # (B, L, E)
    student: Tensor  # (B, L, D)
    teacher: Tensor  # (B, L_t, D)
    weight: Tensor  # (D, E)
    bias: Tensor  # (D,)
    norm_weight: Tensor  # (E,)
    norm_bias: Tensor  # (E,)
    prefix: Tensor  # (1, D)
    cu: Tensor  # (B + 1,)
    cu_t: Tensor
    rows: Tensor  # (T,) rows of the flattened (B, L)
    rows_t: Tensor
    pairs_s: Tensor  # (P,) packed rows
    pairs_t: Tensor
    packed_student: Tensor  # (T, D)
    packed_teacher: Tensor
    direction: Tensor  # (T + B, D), the gradient that comes in from the LLM
    padded_direction: Tensor  # (B, L + 1, D), the same with zeros at padding
    with_prefix: Tensor  # (T + B,) rows of the flattened (B, L + 1)
    inside: Tensor  # (T,) rows of (T + B) that are not the prefix
    compile: bool = False
    backward: bool = True
    packed_encoder: Tensor = field(init=False)  # (T, E)

    def __post_init__(self) -> None:
        self.packed_encoder = self.encoder.flatten(0, 1)[self.rows]

    def wide(self) -> Problem:
        """The same in fp64."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        floats = {k: x.double() for k, x in values.items() if isinstance(x, Tensor) and x.is_floating_point()}
        return replace(self, **floats)


def make(
    lengths: str = "NLI",
    count: int = 32,
    width: int = 1024,
    out: int = 2048,
    compile: bool = False,
    *,
    dtype: torch.dtype,
    device: str,
) -> Problem:
    """Random states; the teacher's sequences are a tenth longer, and half of the student's rows have a partner.

    compile: whether the torch.compile variants run too; at every size they would take most of an hour.
    """
    torch.manual_seed(0)
    sizes = DISTRIBUTIONS[lengths](count)
    other = [max(1, round(n * 1.1)) for n in sizes]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    def packing(ns: list[int], extra: int = 0) -> tuple[Tensor, Tensor]:
        rows = torch.cat([torch.arange(n + extra) + b * (max(ns) + extra) for b, n in enumerate(ns)])
        return torch.tensor([0, *torch.tensor(ns).cumsum(0)], dtype=torch.int32).to(device), rows.to(device)

    (cu, rows), (cu_t, rows_t), (_, with_prefix) = packing(sizes), packing(other), packing(sizes, 1)
    student, teacher = normal(count, max(sizes), out), normal(count, max(other), out)
    pairs_s = torch.arange(0, sum(sizes), 2, device=device)
    own = torch.searchsorted(cu[1:].contiguous(), pairs_s.int(), right=True)
    pairs_t = torch.minimum(cu_t[own].long() + pairs_s - cu[own].long(), cu_t[own + 1].long() - 1)
    direction = normal(sum(sizes) + count, out)
    padded = direction.new_zeros(count * (max(sizes) + 1), out)
    padded[with_prefix] = direction
    keep = torch.ones(sum(sizes) + count, dtype=torch.bool, device=device)
    keep[cu[:-1].long() + torch.arange(count, device=device)] = False
    return Problem(
        sizes, normal(count, max(sizes), width), student, teacher, normal(out, width, scale=width**-0.5), normal(out),
        normal(width) + 1, normal(width), normal(1, out), cu, cu_t, rows, rows_t, pairs_s, pairs_t,
        student.flatten(0, 1)[rows].contiguous(), teacher.flatten(0, 1)[rows_t].contiguous(), direction,
        padded.view(count, -1, out), with_prefix, keep.nonzero().squeeze(1), compile,
    )  # fmt: skip


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def trained(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh leaves of what the projection trains: weight, bias, prefix."""
    return _leaf(p.weight), _leaf(p.bias), _leaf(p.prefix)


def embedded(p: Problem, y: Tensor, leaves: tuple[Tensor, ...], direction: Tensor) -> dict[str, Any]:
    """Backward of embeddings, and everything by name."""
    if p.backward:
        y.backward(direction)
    w, b, prefix = leaves
    return {"embeddings": y.detach(), "weight": w.grad, "bias": b.grad, "prefix": prefix.grad}


def project_ours(p: Problem) -> dict[str, Any]:
    """packed_projection: gather, LayerNorm, linear, bias, scale and prefix in one op."""
    leaves = w, b, prefix = trained(p)
    y = packed_projection(
        p.encoder,
        w,
        b,
        rows=p.rows,
        norm="layer",
        norm_weight=p.norm_weight,
        norm_bias=p.norm_bias,
        scale=0.5,
        cu_seqlens=p.cu,
        prefix=prefix,
    )
    return embedded(p, y, leaves, p.direction)


def _padded_chain(x: Tensor, nw: Tensor, nb: Tensor, w: Tensor, b: Tensor, prefix: Tensor) -> Tensor:
    y = F.linear(F.layer_norm(x, x.shape[-1:], nw, nb, 1e-5), w, b) * 0.5
    return torch.cat([prefix.expand(y.shape[0], 1, -1), y], 1)


def _packed_chain(
    x: Tensor, rows: Tensor, inside: Tensor, nw: Tensor, nb: Tensor, w: Tensor, b: Tensor, prefix: Tensor, count: int
) -> Tensor:
    h = F.layer_norm(x.flatten(0, 1)[rows], x.shape[-1:], nw, nb, 1e-5)
    y = F.linear(h, w, b) * 0.5
    return prefix.expand(y.shape[0] + count, -1).index_copy(0, inside, y)


def project_padded(p: Problem, chain: Callable[..., Tensor] = _padded_chain) -> dict[str, Any]:
    """LayerNorm, Linear, scale and a concatenated prefix over the padded batch."""
    leaves = w, b, prefix = trained(p)
    return embedded(p, chain(p.encoder, p.norm_weight, p.norm_bias, w, b, prefix), leaves, p.padded_direction)


def project_packed(p: Problem, chain: Callable[..., Tensor] = _packed_chain) -> dict[str, Any]:
    """The same on gathered rows, op by op."""
    leaves = w, b, prefix = trained(p)
    y = chain(p.encoder, p.rows, p.inside, p.norm_weight, p.norm_bias, w, b, prefix, len(p.lengths))
    return embedded(p, y, leaves, p.direction)


def packed_rows(p: Problem, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded embeddings in packed order."""
    return {**out, "embeddings": out["embeddings"].flatten(0, 1)[p.with_prefix]}


def triton_forward(library: bool, p: Problem) -> dict[str, Tensor]:
    """The forward by our Triton GEMM, or by our kernels around the library's (the tile table chooses between them)."""
    ends = {"scale": 0.5, "cu_seqlens": p.cu, "prefix": p.prefix}
    return launched(library, p, p.encoder.flatten(0, 1), rows=p.rows, **ends)


def launched(library: bool, p: Problem, x: Tensor, **more: Any) -> dict[str, Tensor]:
    """LayerNorm and linear of rows of x (..., E) by one of the two; `more` of the op's arguments."""
    from mtllm_fast.kernels import packed_projection_launch as launch
    from mtllm_fast.kernels.packed_projection_ops import PackedLinear

    norm = {"norm": "layer", "norm_weight": p.norm_weight, "norm_bias": p.norm_bias, "eps": 1e-5}
    call = PackedLinear(x=x, w=p.weight, bias=p.bias, dtype=p.weight.dtype, **norm, **more)
    return {"embeddings": launch.packed_linear_triton(call, fused=not library)[0]}


def bare_gemm(p: Problem) -> Tensor:
    """The forward's matrix product over rows that are packed already."""
    return p.packed_encoder @ p.weight.t()


def project_exact(p: Problem) -> dict[str, Tensor]:
    wide = p.wide()
    return packed_rows(wide, project_padded(wide))


def project_work(p: Problem) -> Work:
    """Forward and weight gradient over real tokens; states, embeddings, incoming gradient and weight once each way."""
    tokens, (out, width) = sum(p.lengths), p.weight.shape
    moved = 2 * tokens * width + 2 * (tokens + len(p.lengths)) * out + 2 * out * width
    return Work(moved * p.weight.element_size(), 4.0 * tokens * width * out)


# ---- losses over hidden states


def finish(p: Problem, x: Tensor, total: Tensor) -> dict[str, Any]:
    if p.backward:
        total.backward()
    return {"loss": total.detach(), "gradient": x.grad}


def pooled_ours(p: Problem) -> dict[str, Any]:
    x = _leaf(p.packed_student)
    total, count = pooled_mse(x, p.packed_teacher, p.cu, p.cu_t)
    return finish(p, x, total / count)


def paired_ours(p: Problem) -> dict[str, Any]:
    x = _leaf(p.packed_student)
    total, count = paired_mse(x, p.packed_teacher, p.pairs_s, p.pairs_t, rows_sorted=True)
    return finish(p, x, total / count)


def both_ours(p: Problem) -> dict[str, Any]:
    """Both terms in one autograd node."""
    x = _leaf(p.packed_student)
    terms = distillation_loss(
        x,
        p.packed_teacher,
        cu_seqlens_s=p.cu,
        cu_seqlens_t=p.cu_t,
        paired=True,
        rows_s=p.pairs_s,
        rows_t=p.pairs_t,
        rows_sorted=True,
    )
    assert terms.pooled_mse is not None and terms.paired_mse is not None
    return finish(p, x, terms.pooled_mse[0] / terms.pooled_mse[1] + terms.paired_mse[0] / terms.paired_mse[1])


def _padded_mean(states: Tensor, cu: Tensor) -> Tensor:
    lengths = cu.diff()
    mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return (states * mask[..., None]).sum(1) / lengths[:, None]


def _packed_mean(states: Tensor, cu: Tensor) -> Tensor:
    lengths = cu.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=states.device), lengths, output_size=len(states))
    return states.new_zeros(len(lengths), states.shape[1]).index_add(0, owner, states) / lengths[:, None]


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a, b) if a.dtype == torch.float64 else F.mse_loss(a.float(), b.float())


def _pooled_padded(x: Tensor, t: Tensor, p: Any) -> Tensor:
    return _mse(_padded_mean(x, p.cu), _padded_mean(t, p.cu_t))


def _paired_padded(x: Tensor, t: Tensor, p: Any) -> Tensor:
    return _mse(x.flatten(0, 1)[p.rows[p.pairs_s]], t.flatten(0, 1)[p.rows_t[p.pairs_t]])


def _both_padded(x: Tensor, t: Tensor, p: Any) -> Tensor:
    return _pooled_padded(x, t, p) + _paired_padded(x, t, p)


def _pooled_packed(x: Tensor, t: Tensor, p: Any) -> Tensor:
    return _mse(_packed_mean(x, p.cu), _packed_mean(t, p.cu_t))


def _paired_packed(x: Tensor, t: Tensor, p: Any) -> Tensor:
    return _mse(x[p.pairs_s], t[p.pairs_t])


def _both_packed(x: Tensor, t: Tensor, p: Any) -> Tensor:
    return _pooled_packed(x, t, p) + _paired_packed(x, t, p)


def loss_padded(loss: Callable[..., Tensor], p: Problem) -> dict[str, Any]:
    x = _leaf(p.student)
    return finish(p, x, loss(x, p.teacher, p))


def loss_packed(loss: Callable[..., Tensor], p: Problem) -> dict[str, Any]:
    x = _leaf(p.packed_student)
    return finish(p, x, loss(x, p.packed_teacher, p))


def packed_gradient(p: Problem, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of padded states in packed order."""
    return {**out, "gradient": out["gradient"].flatten(0, 1)[p.rows]}


def copy(p: Problem) -> Tensor:
    """Reading and writing the student's states once: the device's bandwidth on this very tensor."""
    return p.packed_student.clone()


def loss_exact(loss: Callable[..., Tensor], p: Problem) -> dict[str, Tensor]:
    wide = p.wide()
    return packed_gradient(wide, loss_padded(loss, wide))


def loss_work(pooled: bool, paired: bool, p: Problem) -> Work:
    """Both sides' rows read once per term, the gradient written once (paired rows are read again for it)."""
    tokens, other, pairs = sum(p.lengths), len(p.packed_teacher), len(p.pairs_s)
    rows = (tokens + other if pooled else 0) + (4 * pairs if paired else 0) + tokens
    return Work(rows * p.student.shape[-1] * p.student.element_size())


_LAST: list[object] = [None]


def fresh_compile(p: object) -> None:
    """Forget graphs of other shapes: beyond eight recompilations torch.compile silently runs eagerly."""
    if _LAST[0] is not p:
        torch.compiler.reset()
        _LAST[0] = p


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile on first use."""
    return torch.compile(function, dynamic=False)


def _compiled_variant(run: Callable[..., Any], chain: Callable[..., Any], first: bool, **options: Any) -> Variant:
    whole = compiled(chain)
    call = partial(run, whole) if first else partial(run, chain=whole)
    applies = operator.attrgetter("compile")
    return Variant(call, needs=("compiler",), prepare=fresh_compile, applies=applies, quick=False, **options)


def sizes(**widths: int) -> tuple[Size, ...]:
    return tuple({"label": name, "lengths": name, **widths, "compile": name == "NLI"} for name in DISTRIBUTIONS)


CPU = {"count": 32, "width": 1024, "out": 2048}
GPU = {"count": 512, "width": 1024, "out": 4096}
SIZES: dict[str, tuple[Size, ...]] = {
    "quick": ({"label": "NLI, small", "lengths": "NLI", "count": 16, "width": 256, "out": 512},),
    "cpu": tuple(s for s in sizes(**CPU) if s["label"] != "web text")
    + ({"label": "web text", "lengths": "web text", "count": 8, "width": 1024, "out": 2048},),
    "cuda": (
        *sizes(**GPU),
        *(
            {"label": f"T=16384, {w} to 4096", "lengths": "padding 0%", "count": 256, "width": w, "out": 4096}
            for w in (1024, 2048)
        ),
    ),
}
# the sweep over the share of padding is made for the whole loss, not once more for each of its parts
NO_SWEEP = {**SIZES, "cpu": tuple(s for s in SIZES["cpu"] if not s["label"].startswith("padding"))}
COMMON: dict[str, Any] = {
    "make": make,
    "tolerance": {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2},
    "shape": lambda p: {
        "B": len(p.lengths),
        "T": sum(p.lengths),
        "L": max(p.lengths),
        "E": p.weight.shape[1],
        "D": p.weight.shape[0],
    },
    "warm": {"lengths": "padding 25%", "count": 2, "width": 32, "out": 48},
}

register(
    Case(
        name="packed_projection",
        about="encoder states to LLM embeddings: unpad, LayerNorm, linear, scale, prefix row; forward + backward",
        variants={
            "ours": Variant(project_ours, ours=True),
            "ours-triton": Variant(partial(triton_forward, False), ours=True, devices=("cuda",), keys=("embeddings",)),
            "ours-library": Variant(partial(triton_forward, True), ours=True, devices=("cuda",), keys=("embeddings",)),
            "padded": Variant(project_padded, packed_rows),
            "packed, unfused": Variant(project_packed),
            "padded, compile": _compiled_variant(project_padded, _padded_chain, False, result=packed_rows),
            "packed, compile": _compiled_variant(project_packed, _packed_chain, False),
            "gemm": Variant(bare_gemm, gated=False),
        },
        reference=project_exact,
        work=project_work,
        aims=dict.fromkeys(("T=16384, 1024 to 4096", "T=16384, 2048 to 4096"), (("ours", "gemm", "forward", 1.10),)),
        sizes=SIZES,
        sources=("kernels/packed_projection*.py", "kernels/gemms.py", "kernels/tiles.py", "kernels/segments.py"),
        **COMMON,
    )
)
for name, ours, padded, packed, terms in (
    ("pooled_mse", pooled_ours, _pooled_padded, _pooled_packed, (True, False)),
    ("paired_mse", paired_ours, _paired_padded, _paired_packed, (False, True)),
    ("distillation_loss", both_ours, _both_padded, _both_packed, (True, True)),
):
    register(
        Case(
            name=name,
            about={
                "pooled_mse": "MSE of mean-pooled hidden states",
                "paired_mse": "MSE of hidden states at aligned rows",
                "distillation_loss": "pooled and paired MSE in one autograd node",
            }[name]
            + ", forward + backward",
            variants={
                "ours": Variant(ours, ours=True),
                "padded": Variant(partial(loss_padded, padded), packed_gradient),
                "packed, unfused": Variant(partial(loss_packed, packed)),
                "padded, compile": _compiled_variant(loss_padded, padded, True, result=packed_gradient),
                "packed, compile": _compiled_variant(loss_packed, packed, True),
                "copy": Variant(copy, gated=False),
            },
            reference=partial(loss_exact, padded),
            work=partial(loss_work, *terms),
            sizes=SIZES if name == "distillation_loss" else NO_SWEEP,
            sources=(
                "kernels/hidden_mse*.py",
                "kernels/distillation_loss.py",
                "kernels/segments.py",
                "kernels/tiles.py",
            ),
            **COMMON,
        )
    )


if __name__ == "__main__":
    names = ("packed_projection", "pooled_mse", "paired_mse", "distillation_loss")
    sys.exit(main(cases=names, prog="benchmarks.cases.packed_path"))
