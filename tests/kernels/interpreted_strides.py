"""Every Triton launch on views: rows apart from each other, NaN from just past a row's end to the next row.

`test_triton_interpreter.py` runs this file in a process of its own. Every width is below its block, so that a mask that
reaches too far, and every stride that is taken for a width, meets the NaN.
"""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import hidden_mse_launch as hidden
from mtllm_fast.kernels import linear_kl_launch as kl
from mtllm_fast.kernels import packed_projection_launch as projection
from mtllm_fast.kernels.hidden_mse_ops import HiddenLoss, SegmentMean, StateGradient
from mtllm_fast.kernels.linear_kl_ops import Difference, MomentsOf, MomentStep
from mtllm_fast.kernels.linear_kl_triton import exp_rows, finish_moments, kl_rows
from mtllm_fast.kernels.packed_projection_ops import PackedLinear
from mtllm_fast.kernels.tiles import GemmTile, HiddenMSETiles, LinearKLTiles, ProjectionTiles, RowTile
from torch import Tensor

from tests.kernels.hidden_cases import cu, exact_paired, exact_pooled
from tests.kernels.linear_kl_cases import check, make_case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
HIDDEN = HiddenMSETiles(piece=4, gradient_piece=2, finish_block=4, values_per_thread=1)
TILE = GemmTile(block_t=16, block_d=16, block_e=16, group_t=2, num_warps=4, num_stages=1)
ONE = torch.tensor([1.0, 0.0, 0.0])


def apart(x: Tensor, gap: int) -> Tensor:
    """The rows of x (n, D), `gap` NaNs after each and a row of NaN after every second one."""
    wide = x.new_full((2 * x.shape[0], x.shape[1] + gap), torch.nan)
    return wide[::2, : x.shape[1]].copy_(x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.2


def test_pooled():
    student, teacher = normal(9, 5), normal(11, 5, seed=1)
    bounds, weight = (cu([2, 0, 6]), cu([3, 1, 7])), torch.tensor([0.5, 1.0, -2.0])
    sides = {"teacher": apart(teacher, 3), "bounds_s": bounds[0], "bounds_t": bounds[1], "segment_weight": weight}
    values, u = hidden.pooled_triton(HiddenLoss(student=apart(student, 2), **sides, need_dx=True), HIDDEN)
    more = normal(9, 5, seed=3)
    made = {"u": u, "bounds": bounds[0], "more": apart(more, 4)}
    call = StateGradient(scales=torch.tensor([0.7, 0.0, 0.3]), student=apart(student, 2), **made)
    dx = hidden.state_gradient_triton(call, HIDDEN)
    exact = exact_pooled(student, teacher, *bounds, weight=weight)
    check((values * weight).sum(), exact["total"], 1e-5)
    check(dx, 0.7 * exact["dx"] + 0.3 * more.double(), 1e-5)


def test_pairs():
    student, teacher = normal(6, 5), normal(7, 5, seed=1)
    rows_s, rows_t, weight = torch.tensor([5, 0, 5, 2]), torch.tensor([6, 1, 1, 0]), torch.tensor([1.0, 0.0, -0.5, 2.0])
    shared = {"student": apart(student, 2), "teacher": apart(teacher, 3)}
    shared |= {"rows_s": rows_s, "rows_t": rows_t, "pair_weight": weight}
    values = hidden.pairs_triton(HiddenLoss(**shared), HIDDEN)
    call = StateGradient(**shared, scales=torch.tensor([0.0, 0.5, 0.0]))
    dx = hidden.state_gradient_triton(call, HIDDEN)
    exact = exact_paired(student, teacher, rows_s, rows_t, weight)
    check((values * weight).sum(), exact["total"], 1e-5)
    check(dx, 0.5 * exact["dx"], 1e-5)


def test_segment_mean():
    x = normal(9, 5)
    mean = hidden.segment_mean_triton(SegmentMean(x=apart(x, 2), bounds=cu([2, 6])), HIDDEN)
    check(mean, torch.stack([x[:2].double().mean(0), x[2:8].double().mean(0)]), 1e-6)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("fused", [True, False])
def test_projection(norm, fused):
    x, w, rows = normal(7, 5), normal(6, 5, seed=1), torch.tensor([6, 0, 3])
    norm_weight, norm_bias = normal(5, seed=2), normal(5, seed=3)
    shift = None if norm != "layer" else norm_bias
    call = PackedLinear(
        x=apart(x, 2), rows=rows, w=apart(w, 3), norm=norm, norm_weight=None if norm == "none" else norm_weight,
        norm_bias=shift, eps=1e-2, dtype=torch.float32,
    )  # fmt: skip
    got, _ = projection.packed_linear_triton(call, fused, ProjectionTiles(TILE, TILE, 9999))
    own = x[rows].double()
    if norm == "rms":
        own = torch.nn.functional.rms_norm(own, (5,), norm_weight.double(), 1e-2)
    if norm == "layer":
        own = torch.nn.functional.layer_norm(own, (5,), norm_weight.double(), norm_bias.double(), 1e-2)
    check(got, own @ w.double().T, 1e-5)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_linear_kl_with_one_gradient(need):
    case = make_case(pairs=6, width=8, vocab=70, bias=True, separate=True, row_weight=torch.linspace(-1, 1.5, 6))
    exact, o = case.exact(), case.options
    tiles = LinearKLTiles(4, RowTile(32, 1), RowTile(32, 1), RowTile(4, 1))
    call = Difference(
        h_s=apart(case.h_s, 2), w_s=apart(case.w_s, 3), h_t=apart(case.h_t, 1), w_t=apart(case.w_t, 5), **o,
        **dict(zip(("need_dh", "need_dw", "need_db"), need)),
    )  # fmt: skip
    got = kl.difference_triton(call, tiles)
    check(got[0], exact["total"], 1e-5)
    wanted = need.index(True)
    check(got[2 + wanted] * 0.5, exact[("dh", "dw", "db")[wanted]], 1e-5)
    assert [x.shape[0] > 0 for x in got[2:]] == list(need)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_kl_rows(divergence):
    """Strides of student, teacher and gradient that differ, and are not `padded`; two blocks, the second one partial."""
    vocab, padded = 21, 24
    z_s, z_t = (3 * normal(3, vocab, seed=seed) for seed in (0, 1))
    wide = [x.new_full((3, padded + gap), torch.nan) for x, gap in ((z_s, 2), (z_t, 7), (z_s, 5))]
    wide[0][:, :vocab], wide[1][:, :vocab] = z_s, z_t
    weight, value = torch.tensor([1.0, 0.0, -2.0]), torch.full((3,), torch.nan)
    kl_rows[(3,)](
        wide[0], wide[1], wide[2], value, value, weight, value, wide[0].stride(0), wide[1].stride(0),
        wide[2].stride(0), vocab, padded, 0.5, 0.0, 4.0, 0.3, 1.0,
        DIVERGENCE=divergence, HAS_BIAS_S=False, HAS_BIAS_T=False, HAS_WEIGHT=True, HAS_SOFTCAP=False, NEED_GRAD=True,
        BARRIER=False, BLOCK_V=16,
    )  # fmt: skip
    leaf = z_s.double().requires_grad_()
    log_s, log_t = (leaf / 2).log_softmax(-1), (z_t.double() / 2).log_softmax(-1)
    mixture = (0.3 * log_t.exp() + 0.7 * log_s.exp()).log()
    right = {
        "forward": (log_t.exp() * (log_t - log_s)).sum(-1),
        "reverse": (log_s.exp() * (log_s - log_t)).sum(-1),
        "jsd": 0.3 * (log_t.exp() * (log_t - mixture)).sum(-1) + 0.7 * (log_s.exp() * (log_s - mixture)).sum(-1),
    }[divergence]
    right[::2].sum().backward()
    check(value[::2], 4 * right[::2], 1e-5)
    check(wide[2][:, :vocab], 2 * leaf.grad, 1e-5)  # the kernel leaves the 1/τ of the chain rule to the GEMM's factor
    assert value[1] == 0
    assert wide[2][:, padded:].isnan().all(), "written beyond its row"


def test_exp_rows():
    vocab, padded = 21, 24
    z, bias = 3 * normal(3, vocab), normal(vocab, seed=1)
    wide, out = torch.full((3, padded + 3), torch.nan), torch.full((3, padded + 6), torch.nan)
    wide[:, :vocab] = z
    padded_bias = torch.nn.functional.pad(bias, (0, padded - vocab), value=torch.nan)
    lse, inv_sum, entropy, bias_mean = (torch.full((3,), torch.nan) for _ in range(4))
    exp_rows[(3,)](
        wide, out, padded_bias, padded_bias.nan_to_num(), lse, inv_sum, entropy, bias_mean, wide.stride(0), out.stride(0),
        vocab, padded, 0.5, 0.0, 1.0,
        HAS_BIAS=True, HAS_VALUE_BIAS=True, HAS_SOFTCAP=False, WANT_ENTROPY=True, BARRIER=False, BLOCK_V=16,
    )  # fmt: skip
    logits = (z + bias).double() / 2
    p = logits.softmax(-1)
    check(lse, logits.logsumexp(-1), 1e-5)
    check(entropy, -(p * p.log()).sum(-1), 1e-5)
    check(bias_mean, p @ bias.double(), 1e-5)
    check(out[:, :vocab] * inv_sum[:, None], p, 1e-5)
    assert out[:, padded:].isnan().all(), "written beyond its row"


@pytest.mark.parametrize("weighted", [False, True])
def test_finish_moments(weighted):
    """Five widths of 5 behind strides that all differ."""
    ew, x, m = (normal(3, 5, seed=seed) for seed in range(3))
    m = normal(6, 5, seed=4)
    dx = torch.full((3, 5 + 9), torch.nan)
    inv_sum, lse, entropy, bias_mean = torch.rand(3) + 0.5, normal(3, seed=5), normal(6, seed=6), normal(6, seed=7)
    rows, weight, value = torch.tensor([5, 0, 2]), torch.tensor([0.5, -1.0, 0.0]), torch.full((3,), torch.nan)
    views = apart(ew, 1), apart(x, 2), apart(m, 3)
    finish_moments[(3,)](
        views[0], inv_sum, lse, views[1], views[2], entropy, bias_mean, rows, weight, value, dx, 1,
        *(view.stride(0) for view in views), dx.stride(0), 5, 0.5, 4.0,
        HAS_ROWS=weighted, HAS_WEIGHT=weighted, NEED_GRAD=True, BLOCK_D=4,
    )  # fmt: skip
    own = rows if weighted else torch.tensor([1, 2, 3])
    factor = (weight if weighted else torch.ones(3)).double()
    taken = m[own].double()
    right = lse.double() - ((taken * x.double()).sum(-1) + bias_mean[own].double()) / 2 - entropy[own].double()
    check(value, 4 * torch.where(factor == 0, 0.0, right), 1e-5)
    check(dx[:, :5], (ew.double() * inv_sum[:, None].double() - taken) * 2 * factor[:, None], 1e-5)
    assert dx[:, 5:].isnan().all(), "written beyond its row"


def test_cached_moments_with_columns_apart():
    case = make_case(pairs=6, width=8, vocab=70, bias=True)
    bias, exact = case.options["bias_s"], case.exact()
    tiles = LinearKLTiles(4, RowTile(32, 1), RowTile(32, 1), RowTile(4, 1))
    head = {"w_t": apart(case.w_s, 3), "bias_t": bias, "bias_s": bias}
    m, entropy, bias_mean = kl.teacher_moments_triton(MomentsOf(h_t=apart(case.h_t, 2), **head), tiles)
    wide = torch.full((6, 16), torch.nan)
    wide[:, ::2] = m
    cached = {"m": wide[:, ::2], "entropy": entropy, "bias_mean": bias_mean}
    step = MomentStep(h_s=apart(case.h_s, 1), w_s=apart(case.w_s, 3), bias_s=bias, **cached, need_dh=True)
    total, _, dh = kl.moment_step_triton(step, tiles)
    check(total, exact["total"], 1e-5)
    check(dh * 0.5, exact["dh"], 1e-5)
