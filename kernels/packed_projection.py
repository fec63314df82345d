"""packed_projection: MT-encoder states to the LLM's packed input embeddings.

    y = scale * (n(x[rows]) @ weight.T + bias)                                    # linear, n = norm over E or nothing
    y = scale * (act(n(x[rows]) @ hidden_weight.T + hidden_bias) @ weight.T + bias)                    # two layers
    out[b] = cat(prefix, y[cu_seqlens[b] : cu_seqlens[b + 1]], suffix)

Gradient: d weight = scale dyᵀ n(x[rows]), d bias = scale Σ dy, d x = n'(scale dy @ weight) scattered to rows, and
prefix and suffix take their rows of d out. Normalised rows are computed again in backward instead of being saved.

2 T E D FLOPs forward. Bytes: (T E + D E + T_out D) times the item size, the least possible; a separate unpad, norm,
bias, scale, cast or insertion of boundary rows would each read and write their tensor once more.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packed_projection_ops as ops
from .hidden_mse import check_vector
from .linear_kl_checks import autocast, check_local, gathered
from .op import needs_gradient
from .packed_projection_cpu import ACTIVATIONS
from .segments import check_bounds

NORMS = ("none", "rms", "layer")


def normalise(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm in x's own precision, by torch."""
    if norm == "none":
        return x
    if norm == "rms":
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def reference(
    x: Tensor,  # (..., E)
    weight: Tensor,  # (D, E or H)
    bias: Tensor | None = None,
    *,
    hidden_weight: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    activation: str = "relu",
    rows: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    prefix: Tensor | None = None,
    suffix: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`packed_projection` by torch, one pass after the other, in the operands' own precision."""
    x = x.reshape(-1, x.shape[-1])
    x = normalise(x if rows is None else x[rows], norm or "none", norm_weight, norm_bias, eps)
    if hidden_weight is not None:
        x = ACTIVATIONS[activation](F.linear(x, hidden_weight, hidden_bias))
    y = F.linear(x, weight, bias) * scale
    if prefix is not None or suffix is not None:
        assert cu_seqlens is not None
        parts = []
        edges = cu_seqlens.tolist()
        for b, (start, end) in enumerate(pairwise(edges)):
            own = [e if e is None or e.dim() == 2 else e[b] for e in (prefix, suffix)]
            parts += [e.to(y.dtype) for e in (own[0], y[start:end], own[1]) if e is not None]
        y = torch.cat(parts)
    return y if dtype is None else y.to(dtype)


def with_boundaries(cu_seqlens: Tensor, extra: int) -> Tensor:
    """cu_seqlens of the result when every sequence gets `extra` boundary rows."""
    index = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return cu_seqlens + extra * index


def _check_linear(
    name: str, weight: Tensor, bias_name: str, bias: Tensor | None, width: int, device: torch.device
) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(f"{name} must have shape (out, {width}) with out >= 1, got {tuple(weight.shape)}")
    if weight.device != device:
        raise ValueError(f"{name} is on {weight.device}, but x is on {device}; move it there")
    check_vector(bias_name, bias, (weight.shape[0],), device, rows=False)


def check_norm(norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float, x: Tensor) -> str:
    """The norm's name in the ops."""
    name = "none" if norm is None else norm
    if name not in NORMS:
        raise ValueError(f"norm is {norm!r}, but must be None, 'rms' or 'layer'")
    if name == "none" and (weight is not None or bias is not None):
        raise ValueError("norm_weight or norm_bias is given, but norm is None")
    if name == "rms" and bias is not None:
        raise ValueError("norm_bias is given, but an RMSNorm has none")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps}, but must be a finite number of at least 0")
    for label, value in (("norm_weight", weight), ("norm_bias", bias)):
        check_vector(label, value, (x.shape[1],), x.device, rows=False)
    return name


def _check_boundary(name: str, rows: Tensor | None, width: int, cu_seqlens: Tensor | None, x: Tensor) -> None:
    if rows is None:
        return
    if not rows.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {rows.dtype}")
    if cu_seqlens is None:
        raise ValueError(f"{name} is given, but cu_seqlens is None: it says where sequences begin and end")
    if rows.device != x.device:
        raise ValueError(f"{name} is on {rows.device}, but x is on {x.device}; move it there")
    count = cu_seqlens.shape[0] - 1
    if rows.dim() not in (2, 3) or rows.shape[-1] != width or (rows.dim() == 3 and rows.shape[0] != count):
        raise ValueError(f"{name} must have shape (n, {width}) or ({count}, n, {width}), got {tuple(rows.shape)}")


def packed_projection(
    x: Tensor,  # (N, E) or (B, L, E)
    weight: Tensor,  # (D, E), (D, H) behind a hidden layer
    bias: Tensor | None = None,  # (D,)
    *,
    hidden_weight: Tensor | None = None,  # (H, E)
    hidden_bias: Tensor | None = None,  # (H,)
    activation: str = "relu",
    rows: Tensor | None = None,  # (T,)
    norm: str | None = None,
    norm_weight: Tensor | None = None,  # (E,)
    norm_bias: Tensor | None = None,  # (E,)
    eps: float = 1e-5,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    prefix: Tensor | None = None,  # (n, D) or (B, n, D)
    suffix: Tensor | None = None,  # (m, D) or (B, m, D)
    dtype: torch.dtype | None = None,
) -> Tensor:  # (T + B (n + m), D)
    """Project packed or padded encoder states to the LLM's packed input embeddings, in one pass over each tensor.

    Args:
        x: (N, E) packed or (B, L, E) padded encoder states, fp32, bf16, fp16 (or fp64 on the CPU).
        weight, bias: of the (last) linear layer. hidden_weight, hidden_bias: of a hidden layer before it.
        activation: "relu", "gelu" (erf) or "silu" behind the hidden layer.
        rows: (T,) int32 or int64 rows of x (of its flattened (B L, E) where it is padded), packed order; may repeat.
            None takes all rows of a packed x.
        norm: None, "layer" or "rms" over E first: the encoder's final norm with norm_weight, norm_bias, eps.
        scale: factor on the projected rows; boundary rows are taken as they are.
        cu_seqlens: (B + 1,) int32 or int64 over the T rows; needed for, and only used by, prefix and suffix.
        prefix, suffix: embeddings put before and after every sequence (an empty one too), shared or one per sequence.
        dtype: of the result, that of weight by default.

    Every floating-point tensor gets a gradient if it requires one; x's costs two GEMMs' worth only if it does.

    Returns:
        (T + B (n + m), D); its cu_seqlens are `with_boundaries(cu_seqlens, n + m)`.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        IndexError: a row number out of range (on CUDA a device-side assertion, unless MTLLM_DEBUG=1).
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    check_local("x", x)
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (N, E) or (B, L, E) with E >= 1, got {tuple(x.shape)}")
    if x.dim() == 3 and rows is None:
        raise ValueError("rows is None, but x is padded: pass the rows of its flattened (B * L, E) that hold tokens")
    x = autocast(x.reshape(-1, x.shape[-1]))
    weight, hidden_weight = autocast(gathered("weight", weight)), autocast(gathered("hidden_weight", hidden_weight))
    bias, hidden_bias = gathered("bias", bias), gathered("hidden_bias", hidden_bias)
    norm_weight, norm_bias = gathered("norm_weight", norm_weight), gathered("norm_bias", norm_bias)
    prefix, suffix = gathered("prefix", prefix), gathered("suffix", suffix)
    width = x.shape[1]
    if hidden_weight is not None:
        _check_linear("hidden_weight", hidden_weight, "hidden_bias", hidden_bias, width, x.device)
        if activation not in ACTIVATIONS or activation == "none":
            raise ValueError(f"activation is {activation!r}, but must be one of relu, gelu, silu")
        if hidden_weight.dtype != weight.dtype:
            raise ValueError(f"hidden_weight is {hidden_weight.dtype} but weight is {weight.dtype}; cast one of them")
    elif hidden_bias is not None:
        raise ValueError("hidden_bias is given, but hidden_weight is None")
    inner = width if hidden_weight is None else hidden_weight.shape[0]
    _check_linear("weight", weight, "bias", bias, inner, x.device)
    name = check_norm(norm, norm_weight, norm_bias, eps, x)
    if rows is not None:
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape (T,), got {tuple(rows.shape)}")
        check_vector("rows", rows, (rows.shape[0],), x.device, rows=True)
    if cu_seqlens is not None:
        check_bounds("cu_seqlens", cu_seqlens, x.device, "x")
    for label, embeddings in (("prefix", prefix), ("suffix", suffix)):
        _check_boundary(label, embeddings, weight.shape[0], cu_seqlens, x)
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale is {scale}, but must be a finite number")

    layer = {"x": x, "rows": rows, "norm": name, "norm_weight": norm_weight, "norm_bias": norm_bias, "eps": float(eps)}
    if hidden_weight is not None:
        need_pre = any(map(needs_gradient, (x, hidden_weight, hidden_bias, norm_weight, norm_bias)))
        hidden, _ = ops.packed_linear(
            **layer, w=hidden_weight, bias=hidden_bias, activation=activation, dtype=weight.dtype, need_pre=need_pre
        )
        layer = {"x": hidden}
    ends = {"cu_seqlens": cu_seqlens, "prefix": prefix, "suffix": suffix, "dtype": dtype or weight.dtype}
    y, _ = ops.packed_linear(**layer, w=weight, bias=bias, scale=float(scale), **ends)
    return y
