"""Triton kernels of `packed_projection`.

`norm_rows`        gather + LayerNorm/RMSNorm of encoder rows: 1/std and mean of each row, and (where a GEMM library or
                   backward needs them) the normalised rows.
`fold_norm`        W' = W · norm_weight, its row sums in fp32 over W' as stored, and bias + W @ norm_bias.
`projection_gemm`  gather, GEMM, norm, bias, activation, scale and cast, written to rows of the packed LLM input:
                   y = scale · act(rstd · (x W'ᵀ) - rstd · mean · sums + bias').

The norm acts in the epilogue, so the GEMM's operands go from memory to the tensor cores untouched. `sums` is taken over
the rounded W', so a large mean cancels exactly up to fp32 accumulation.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x_ptr,  # (N, E)
    rows_ptr,  # (T,) or unused
    norm_weight_ptr,  # (E,) or unused
    norm_bias_ptr,  # (E,) or unused
    out_ptr,  # (T, E) or unused
    rstd_ptr,  # (T,) fp32
    mean_ptr,  # (T,) fp32 or unused
    stride_x,
    width,
    eps,
    NORM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_ROWS:
        source = tl.load(rows_ptr + row).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < width
    x = tl.load(x_ptr + source * stride_x + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    if NORM == "layer":
        mean = tl.sum(x, 0) / width
        x = tl.where(mask_e, x - mean, 0.0)
        tl.store(mean_ptr + row, mean)
    if NORM != "none":
        rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        x *= rstd
        tl.store(rstd_ptr + row, rstd)
    if STORE_ROWS:
        if HAS_WEIGHT:
            x *= tl.load(norm_weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(norm_bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * width + offs_e, x.to(out_ptr.dtype.element_ty), mask=mask_e)


@triton.jit
def fold_norm(
    w_ptr,  # (D, E)
    bias_ptr,  # (D,) or unused
    norm_weight_ptr,  # (E,) or unused
    norm_bias_ptr,  # (E,) or unused
    folded_ptr,  # (D, E)
    sums_ptr,  # (D,) fp32
    folded_bias_ptr,  # (D,) fp32
    stride_w,
    width,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < width
    w = tl.load(w_ptr + row * stride_w + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row).to(tl.float32)
    if HAS_NORM_BIAS:
        bias += tl.sum(w * tl.load(norm_bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32), 0)
    tl.store(folded_bias_ptr + row, bias)
    if HAS_WEIGHT:
        w *= tl.load(norm_weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    stored = w.to(folded_ptr.dtype.element_ty)
    if HAS_WEIGHT:
        tl.store(folded_ptr + row * width + offs_e, stored, mask=mask_e)
    tl.store(sums_ptr + row, tl.sum(stored.to(tl.float32), 0))


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0)
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit(do_not_specialize=["tokens"])
def projection_gemm(
    x_ptr,  # (N, E)
    rows_ptr,  # (T,) rows of x, or unused
    w_ptr,  # (D, E), with the norm's weight in it
    sums_ptr,  # (D,) fp32 row sums of w, LayerNorm only
    bias_ptr,  # (D,) fp32 or unused
    rstd_ptr,  # (T,) fp32, with a norm
    mean_ptr,  # (T,) fp32, LayerNorm only
    out_rows_ptr,  # (T,) rows of y, or unused
    y_ptr,  # (T_out, D)
    pre_ptr,  # (T, D) before the activation, or unused
    stride_x,
    stride_w,
    tokens,
    width_out,
    width,
    scale,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_OUT_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_PRE: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter's dot is wrong for bf16
    EVEN_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_t = tl.cdiv(tokens, BLOCK_T)
    blocks_d = tl.cdiv(width_out, BLOCK_D)
    # GROUP_T blocks of rows share the weight blocks they read while those are in L2.
    group = program // (GROUP_T * blocks_d)
    first = group * GROUP_T
    size = tl.minimum(blocks_t - first, GROUP_T)
    inside = program % (GROUP_T * blocks_d)
    offs_t = (first + inside % size) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = (inside // size) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < tokens
    mask_d = offs_d < width_out
    source = offs_t.to(tl.int64)
    if HAS_ROWS:
        source = tl.load(rows_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    else:
        source = tl.where(mask_t, source, 0)
    x_block = x_ptr + source[:, None] * stride_x + offs_e[None, :]
    # Columns beyond D read column 0 and are not stored: no mask in the loop.
    w_block = w_ptr + tl.where(mask_d, offs_d, 0).to(tl.int64)[:, None] * stride_w + offs_e[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, width, BLOCK_E):
        if EVEN_E:
            x = tl.load(x_block + start)
            w = tl.load(w_block + start)
        else:
            x = tl.load(x_block + start, mask=(offs_e < width - start)[None, :], other=0.0)
            w = tl.load(w_block + start, mask=(offs_e < width - start)[None, :], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if NORM != "none":
        rstd = tl.load(rstd_ptr + offs_t, mask=mask_t, other=0.0)
        if NORM == "layer":
            mean = tl.load(mean_ptr + offs_t, mask=mask_t, other=0.0)
            total -= mean[:, None] * tl.load(sums_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        total *= rstd[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    mask = mask_t[:, None] & mask_d[None, :]
    if STORE_PRE:
        pre = pre_ptr + offs_t.to(tl.int64)[:, None] * width_out + offs_d[None, :]
        tl.store(pre, total.to(pre_ptr.dtype.element_ty), mask=mask)
    total = _activated(total, ACTIVATION) * scale
    target = offs_t.to(tl.int64)
    if HAS_OUT_ROWS:
        target = tl.load(out_rows_ptr + offs_t, mask=mask_t, other=0).to(tl.int64)
    y = y_ptr + target[:, None] * width_out + offs_d[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=mask)
