"""The Triton path of packed_projection against fp64, in the interpreter; bf16 GEMMs upcast their operands there."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from mtllm_fast.kernels import packed_projection_launch as launch
from mtllm_fast.kernels.packed_projection_ops import PackedLinear, packed_linear
from mtllm_fast.kernels.tiles import GemmTile, ProjectionTiles

from tests.kernels.linear_kl_cases import LIMITS, check, same_as_fake, same_bits
from tests.kernels.projection_cases import make, reference

TILE = GemmTile(block_t=32, block_d=32, block_e=16, group_t=2, num_warps=4, num_stages=1)
TILES = ProjectionTiles(TILE, TILE, 9999)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run(case, fused, **changes):
    c = {"eps": 1e-5, **case, **changes}
    x, w = c.pop("x"), c.pop("weight")
    c["norm"] = c.get("norm") or "none"
    return launch.packed_linear_triton(
        PackedLinear(x=x.reshape(-1, x.shape[-1]), w=w, dtype=w.dtype, **c), fused, TILES
    )


def exact(case):
    return reference(**{k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()})  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("width", [24, 32])
def test_matches_fp64(fused, norm, width):
    case = make("edges", norm=norm, width=width, boundaries=True, scale=1.7)
    check(run(case, fused)[0], exact(case), 1e-5)
    case = make("tiny", norm=norm, width=width, padded=False)
    check(run(case, fused)[0], exact(case), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_half_precision(dtype, norm):
    """The interpreter truncates to bf16, and W' is rounded once more than W: up to 0.50 % and 0.026 % were seen."""
    case = make(dtype=dtype, norm=norm)
    check(run(case, True)[0], exact(case), {torch.bfloat16: 6e-3, torch.float16: 5e-4}[dtype])


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("fused", [True, False])
def test_activation_and_its_argument(activation, fused):
    case = make(norm="layer", scale=1.7)
    y, pre = run(case, fused, activation=activation, need_pre=True)
    right = exact(case) / 1.7  # the scale is that of the activation
    check(pre, right, 1e-5)
    check(y, getattr(torch.nn.functional, activation)(right) * 1.7, 1e-5)


@pytest.mark.parametrize("changes", [{}, {"bias": None}, {"scale": 1.0}, {"norm": "rms"}, {"need_pre": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_needs_no_pass_over_the_result(changes, dtype):
    """Scale and boundary rows by the product itself: no larger result is read or written again."""
    case = make(dtype=dtype, norm="layer", boundaries=True, scale=1.7)
    need_pre = changes.pop("need_pre", False)
    case |= changes
    if case["norm"] == "rms":
        del case["norm_bias"]
    case["x"][0, 0] = torch.nan  # the row that boundary rows are made from, of no sequence
    case["x"] = torch.cat([case["x"][:, :1], case["x"]], 1)
    length = case["x"].shape[1]
    case["rows"] = case["rows"] + case["rows"] // (length - 1) + 1
    case["x"][0, 1] = 0.25
    y, pre = run(case, False, need_pre=need_pre)
    check(y, exact(case), 1e-5 if dtype == torch.float32 else 8e-3)
    assert pre.shape[0] == (case["rows"].shape[0] if need_pre else 0)


def test_which_product_is_chosen(monkeypatch):
    """The library's unless it needs a pass over a result of a narrow input."""
    taken = []
    monkeypatch.setattr(launch, "_fused", lambda *_: taken.append("fused") or (None, None))
    real = launch._library
    monkeypatch.setattr(launch, "_library", lambda *a: taken.append("library") or real(*a))
    case = make(dtype=torch.bfloat16, norm="layer", boundaries=True, scale=2.0)
    plain = make(dtype=torch.bfloat16)
    run(case, None)
    run(plain, None)
    run(plain, None, activation="gelu")
    wide = ProjectionTiles(TILE, TILE, 23)
    monkeypatch.setitem(run.__globals__, "TILES", wide)
    run(plain, None, activation="gelu")
    assert taken == ["library", "library", "fused", "library"]


def test_large_means_cancel_exactly():
    """|mean| 100 times the deviation: the sums are taken over the W' that the GEMM reads."""
    case = make(dtype=torch.float16, norm="layer", mean=100.0)
    check(run(case, True)[0], exact(case), 3 * LIMITS[torch.float16])


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("need_pre", [False, True])
def test_cuda_kernel_of_the_op_returns_what_its_fake_says(boundaries, need_pre, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)  # the interpreter has none to go to
    c = make(dtype=torch.bfloat16, norm="layer", boundaries=boundaries)
    ends = (c.get("cu_seqlens"), c.get("prefix"), c.get("suffix"))
    arguments = (c["x"].view(-1, 24), c["rows"], c["weight"], c["bias"], "layer", c["norm_weight"], c["norm_bias"])
    arguments += (1e-5, 1.0, "gelu" if need_pre else "none", *ends, torch.float32, need_pre)
    same_as_fake(packed_linear.op, arguments, "cuda")


@pytest.mark.parametrize("fused", [True, False])
def test_no_rows(fused):
    case = make(padded=False, rows=torch.zeros(0, dtype=torch.long), norm="rms")
    assert run(case, fused)[0].shape == (0, 40)
    case |= {"cu_seqlens": torch.zeros(3, dtype=torch.int32), "prefix": torch.ones(1, 40), "x": case["x"][:0]}
    assert torch.equal(run(case, fused)[0], torch.ones(2, 40))


def test_bad_rows():
    case = make(padded=False, rows=torch.tensor([0, 10_000]))
    with pytest.raises(RuntimeError, match="rows holds a row number outside"):
        run(case, True)


def test_bitwise_repeatable_and_independent_of_what_empty_holds():
    case = make(norm="layer", boundaries=True)
    same_bits(lambda: dict(zip(("y", "pre"), run(case, True, need_pre=True))))
