"""Triton row kernels of `linear_kl`: one program per row, fp32 logits in, gradient or exponentials out in place.

`kl_rows`   values and gradient of one row pair. Pass 1 (forward KL) keeps of every four neighbours a running maximum,
            Σ exp and Σ e_t (z_t - z_s), with an exponential and a quarter per entry and side; pass 2 writes p_s - p_t
            over the student's logits. 18 bytes per vocabulary entry (2 x 8 read, 2 written), no reduction over threads
            inside the loops.
`exp_rows`  E = exp(z - max) over the logits, and log-sum-exp, Σ E, the entropy, Σ E bias / Σ E. 10 bytes per entry.
`finish_moments`  value and gradient of the moment form from E @ W. O(D) per row.

Exponentials are exp2 of a difference times log2(e) / τ: the logits are subtracted as they are, so that neither base nor
temperature costs digits where logits are large.

Maximum and sum stay apart: exp(z - lse) sums to 1 only up to the rounding of lse, 1e-4 at logits of 1,500.

Rows of logits and results hold `padded` >= V entries; what lies beyond V is never used.

A 16-bit result shares its row's memory with the fp32 logits: entry i goes to bytes [2i, 2i+2), read before that as part
of logit i // 2. Block k is written to [2kB, 2kB+2B) while later blocks lie at 4(k+1)B and up, so only the block itself
overlaps (k = 0), and the barrier between its loads and its stores is enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)  # a start for running maxima that exp2() can take differences with
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _lanes(BLOCK_V: tl.constexpr):
    """0 to BLOCK_V - 1 as rows of four neighbours, which a thread loads at once.

    Running statistics are kept per row: a quarter of the registers, and of the exponentials that rescale them.
    """
    return tl.arange(0, BLOCK_V // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def _load_logits(
    z_row,
    bias_ptr,
    offs_v,
    vocab,
    padded,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """softcap(z + bias) of one block; -inf beyond the vocabulary.

    The load is masked at `padded`, a multiple of 64, because a mask at an odd `vocab` would break it into single words.
    """
    z = tl.load(z_row + offs_v, mask=offs_v < padded, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=offs_v < padded, other=0.0)
    if HAS_SOFTCAP:
        # tanh(x) = 2 / (1 + e^-2x) - 1
        z = 2.0 * softcap / (1.0 + tl.exp2(z * (-2.0 * LOG2_E / softcap))) - softcap
    return tl.where(offs_v < vocab, z, float("-inf"))


@triton.jit
def _over_mixture(ratio, other):
    """log p - log((1 - other) p + other q), given ratio = log p - log q; exact near 0 and for any ratio."""
    a = tl.abs(ratio)
    small = -a * (1.0 - a / 2.0 * (1.0 - a / 3.0 * (1.0 - a / 4.0 * (1.0 - a / 5.0 * (1.0 - a / 6.0)))))
    y = tl.where(ratio < 0.0, 1.0 - other, other) * tl.where(a < 0.25, small, tl.exp2(a * -LOG2_E) - 1.0)
    # log(1 + y) with the rounding of 1 + y undone (Kahan).
    sum_y = 1.0 + y
    alone = sum_y == 1.0
    log_y = tl.where(alone, y, tl.log(sum_y) * (y / tl.where(alone, 1.0, sum_y - 1.0)))
    return tl.minimum(ratio, 0.0) - log_y


@triton.jit
def kl_rows(
    z_s_ptr,  # (C, V) fp32 student logits
    z_t_ptr,  # (C, V) fp32 teacher logits
    grad_ptr,  # (C, V) gradient, may share the student's memory
    bias_s_ptr,  # (padded,) fp32 or unused
    bias_t_ptr,  # (padded,) fp32 or unused
    weight_ptr,  # (C,) fp32 or unused: rows of weight 0 get value 0 and gradient 0
    value_ptr,  # (C,) fp32
    stride_zs,
    stride_zt,
    stride_g,
    vocab,
    padded,
    inv_temperature,
    softcap,
    scale,
    beta,
    grad_scale,
    DIVERGENCE: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_s_row = z_s_ptr + row * stride_zs
    z_t_row = z_t_ptr + row * stride_zt
    grad_row = grad_ptr + row * stride_g
    lanes = _lanes(BLOCK_V)
    rate = inv_temperature * LOG2_E
    stop = vocab
    if HAS_WEIGHT:
        stop = tl.where(tl.load(weight_ptr + row) == 0.0, 0, vocab)

    max_s = tl.full((BLOCK_V // 4,), LOWEST, tl.float32)
    max_t = tl.full((BLOCK_V // 4,), LOWEST, tl.float32)
    sum_s = tl.zeros((BLOCK_V // 4,), tl.float32)
    sum_t = tl.zeros((BLOCK_V // 4,), tl.float32)
    dot = tl.zeros((BLOCK_V // 4,), tl.float32)
    for start in range(0, stop, BLOCK_V):
        offs_v = start + lanes
        z_s = _load_logits(z_s_row, bias_s_ptr, offs_v, vocab, padded, softcap, HAS_BIAS_S, HAS_SOFTCAP)
        z_t = _load_logits(z_t_row, bias_t_ptr, offs_v, vocab, padded, softcap, HAS_BIAS_T, HAS_SOFTCAP)
        new_s, new_t = tl.maximum(max_s, tl.max(z_s, 1)), tl.maximum(max_t, tl.max(z_t, 1))
        e_s, e_t = tl.exp2((z_s - new_s[:, None]) * rate), tl.exp2((z_t - new_t[:, None]) * rate)
        shrink_s, shrink_t = tl.exp2((max_s - new_s) * rate), tl.exp2((max_t - new_t) * rate)
        sum_s = sum_s * shrink_s + tl.sum(e_s, 1)
        sum_t = sum_t * shrink_t + tl.sum(e_t, 1)
        # An entry of probability 0 counts 0 even where the difference is inf or inf - inf; NaN is not 0 and stays.
        if DIVERGENCE == "forward":
            dot = dot * shrink_t + tl.sum(e_t * tl.where(e_t == 0.0, 0.0, z_t - z_s), 1)
        if DIVERGENCE == "reverse":
            dot = dot * shrink_s + tl.sum(e_s * tl.where(e_s == 0.0, 0.0, z_s - z_t), 1)
        max_s, max_t = new_s, new_t

    top_s, top_t = tl.max(max_s, 0), tl.max(max_t, 0)
    scale_s, scale_t = tl.exp2((max_s - top_s) * rate), tl.exp2((max_t - top_t) * rate)
    total_s, total_t = tl.sum(sum_s * scale_s, 0), tl.sum(sum_t * scale_t, 0)
    norm_s, norm_t = 1.0 / total_s, 1.0 / total_t
    offset = tl.log(total_s) - tl.log(total_t)
    if DIVERGENCE == "forward":
        value = (tl.sum(dot * scale_t, 0) * norm_t + (top_s - top_t)) * inv_temperature + offset
        mean = 0.0
    if DIVERGENCE == "reverse":
        value = (tl.sum(dot * scale_s, 0) * norm_s - (top_s - top_t)) * inv_temperature - offset
        mean = value
    if DIVERGENCE == "jsd":
        mean_s = tl.zeros((BLOCK_V // 4,), tl.float32)
        mean_t = tl.zeros((BLOCK_V // 4,), tl.float32)
        for start in range(0, stop, BLOCK_V):
            offs_v = start + lanes
            z_s = _load_logits(z_s_row, bias_s_ptr, offs_v, vocab, padded, softcap, HAS_BIAS_S, HAS_SOFTCAP)
            z_t = _load_logits(z_t_row, bias_t_ptr, offs_v, vocab, padded, softcap, HAS_BIAS_T, HAS_SOFTCAP)
            below_s, below_t = z_s - top_s, z_t - top_t
            ratio = (below_s - below_t) * inv_temperature - offset
            e_s, e_t = tl.exp2(below_s * rate), tl.exp2(below_t * rate)
            mean_s += tl.sum(e_s * tl.where(e_s == 0.0, 0.0, _over_mixture(ratio, beta)), 1)
            mean_t += tl.sum(e_t * tl.where(e_t == 0.0, 0.0, _over_mixture(-ratio, 1.0 - beta)), 1)
        mean = tl.sum(mean_s, 0) * norm_s
        value = beta * tl.sum(mean_t, 0) * norm_t + (1.0 - beta) * mean
    if HAS_WEIGHT:
        value = tl.where(stop == 0, 0.0, value)
    tl.store(value_ptr + row, value * scale)

    if NEED_GRAD:
        norm_s, norm_t = norm_s * grad_scale, norm_t * grad_scale
        if DIVERGENCE == "jsd":
            norm_s *= 1.0 - beta
        lanes = tl.arange(0, BLOCK_V)
        for start in range(0, stop, BLOCK_V):
            offs_v = start + lanes
            z_s = _load_logits(z_s_row, bias_s_ptr, offs_v, vocab, padded, softcap, HAS_BIAS_S, HAS_SOFTCAP)
            z_t = _load_logits(z_t_row, bias_t_ptr, offs_v, vocab, padded, softcap, HAS_BIAS_T, HAS_SOFTCAP)
            below_s, below_t = z_s - top_s, z_t - top_t
            p_s = tl.exp2(below_s * rate) * norm_s
            if DIVERGENCE == "forward":
                grad = p_s - tl.exp2(below_t * rate) * norm_t
            if DIVERGENCE == "reverse":
                ratio = (below_s - below_t) * inv_temperature - offset
                grad = p_s * tl.where(p_s == 0.0, 0.0, ratio - mean)
            if DIVERGENCE == "jsd":
                ratio = (below_s - below_t) * inv_temperature - offset
                grad = p_s * tl.where(p_s == 0.0, 0.0, _over_mixture(ratio, beta) - mean)
            if HAS_SOFTCAP:
                tanh = tl.where(offs_v < vocab, z_s * (1.0 / softcap), 0.0)
                grad *= 1.0 - tanh * tanh
            if BARRIER:
                tl.debug_barrier()
            tl.store(grad_row + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=offs_v < padded)
        if HAS_WEIGHT:
            nothing = tl.zeros((BLOCK_V,), grad_ptr.dtype.element_ty)
            for start in range(0, vocab - stop, BLOCK_V):
                offs_v = start + lanes
                tl.store(grad_row + offs_v, nothing, mask=offs_v < padded)


@triton.jit
def exp_rows(
    z_ptr,  # (C, V) fp32 logits
    e_ptr,  # (C, V) exp(z - max), may share the logits' memory
    bias_ptr,  # (padded,) fp32 or unused
    value_bias_ptr,  # (padded,) fp32 or unused
    lse_ptr,  # (C,) fp32
    inv_sum_ptr,  # (C,) fp32: 1 / Σ E over E as stored
    entropy_ptr,  # (C,) fp32 or unused
    bias_mean_ptr,  # (C,) fp32 or unused
    stride_z,
    stride_e,
    vocab,
    padded,
    inv_temperature,
    softcap,
    e_scale,
    HAS_BIAS: tl.constexpr,
    HAS_VALUE_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride_z
    e_row = e_ptr + row * stride_e
    lanes = _lanes(BLOCK_V)
    rate = inv_temperature * LOG2_E
    max_z = tl.full((BLOCK_V // 4,), LOWEST, tl.float32)
    for start in range(0, vocab, BLOCK_V):
        z = _load_logits(z_row, bias_ptr, start + lanes, vocab, padded, softcap, HAS_BIAS, HAS_SOFTCAP)
        max_z = tl.maximum(max_z, tl.max(z, 1))
    top = tl.max(max_z, 0)

    exact = tl.zeros((BLOCK_V // 4,), tl.float32)
    stored = tl.zeros((BLOCK_V // 4,), tl.float32)
    below = tl.zeros((BLOCK_V // 4,), tl.float32)
    bias_dot = tl.zeros((BLOCK_V // 4,), tl.float32)
    for start in range(0, vocab, BLOCK_V):
        offs_v = start + lanes
        z = _load_logits(z_row, bias_ptr, offs_v, vocab, padded, softcap, HAS_BIAS, HAS_SOFTCAP)
        e = tl.exp2((z - top) * rate)
        rounded = (e * e_scale).to(e_ptr.dtype.element_ty)
        exact += tl.sum(e, 1)
        # m = E @ W / Σ E with the same rounded E above and below, so that the weights sum to 1 exactly.
        stored += tl.sum(rounded.to(tl.float32), 1)
        if WANT_ENTROPY:
            below += tl.sum(e * tl.where(e == 0.0, 0.0, z - top), 1)
        if HAS_VALUE_BIAS:
            bias = tl.load(value_bias_ptr + offs_v, mask=offs_v < padded, other=0.0)
            bias_dot += tl.sum(e * tl.where(e == 0.0, 0.0, bias), 1)
        if BARRIER:
            tl.debug_barrier()
        tl.store(e_row + offs_v, rounded, mask=offs_v < padded)
    total = tl.sum(exact, 0)
    tl.store(lse_ptr + row, top * inv_temperature + tl.log(total))
    tl.store(inv_sum_ptr + row, 1.0 / tl.sum(stored, 0))
    if WANT_ENTROPY:
        tl.store(entropy_ptr + row, tl.log(total) - tl.sum(below, 0) * inv_temperature / total)
    if HAS_VALUE_BIAS:
        tl.store(bias_mean_ptr + row, tl.sum(bias_dot, 0) / total)


@triton.jit
def finish_moments(
    ew_ptr,  # (C, D) fp32 E @ W
    inv_sum_ptr,  # (C,) fp32
    lse_ptr,  # (C,) fp32
    x_ptr,  # (C, D) student states
    m_ptr,  # (N, D) teacher moments
    entropy_ptr,  # (N,)
    bias_mean_ptr,  # (N,)
    rows_ptr,  # (C,) int64 rows of m, or unused
    weight_ptr,  # (C,) fp32 or unused
    value_ptr,  # (C,) fp32
    dx_ptr,  # (C, D)
    first_row,  # row of m that belongs to row 0 when there are no indices
    stride_ew,
    stride_x,
    stride_m,
    stride_dx,
    width,
    inv_temperature,
    scale,
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_t = row + first_row
    if HAS_ROWS:
        row_t = tl.load(rows_ptr + row).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row)
    inv_sum = tl.load(inv_sum_ptr + row)
    dot = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        x = tl.load(x_ptr + row * stride_x + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        m_t = tl.load(m_ptr + row_t * stride_m + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        dot += m_t * x
        if NEED_GRAD:
            m_s = tl.load(ew_ptr + row * stride_ew + offs_d, mask=mask_d, other=0.0) * inv_sum
            dx = (m_s - m_t) * (weight * scale * inv_temperature)
            if HAS_WEIGHT:
                dx = tl.where(weight == 0.0, 0.0, dx)
            tl.store(dx_ptr + row * stride_dx + offs_d, dx.to(dx_ptr.dtype.element_ty), mask=mask_d)
    linear = tl.sum(dot, 0) + tl.load(bias_mean_ptr + row_t).to(tl.float32)
    value = tl.load(lse_ptr + row) - linear * inv_temperature - tl.load(entropy_ptr + row_t).to(tl.float32)
    if HAS_WEIGHT:
        value = tl.where(weight == 0.0, 0.0, value)
    tl.store(value_ptr + row, value * scale)
