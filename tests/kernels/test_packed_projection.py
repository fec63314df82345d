"""packed_projection on the CPU against fp64: result and every gradient by itself."""

from __future__ import annotations

import pytest
import torch
from mtllm_fast.kernels import packed_projection, with_boundaries

from tests.kernels.hidden_cases import LENGTHS, check_all, cu, random_lengths
from tests.kernels.linear_kl_cases import LIMITS, check, error, largest_error, same_bits
from tests.kernels.projection_cases import exact, make, reference, run

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# A 16-bit GEMM on the CPU rounds its operands' products' sum, the normalised rows and each gradient: four roundings.
WIDER = {torch.float16: 3.0, torch.bfloat16: 3.0}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(lengths, norm, dtype):
    case = make(lengths, dtype=dtype, norm=norm, boundaries=True, scale=1.7)
    check_all(run(packed_projection, case), exact(case), dtype, WIDER.get(dtype, 1.0))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_layers(activation, norm, dtype):
    case = make(dtype=dtype, norm=norm, hidden=48, activation=activation, boundaries=True)
    got, right = run(packed_projection, case), exact(case)
    if activation != "relu" or dtype not in WIDER:
        check_all(got, right, dtype, WIDER.get(dtype, 1.0))
        return
    # A hidden unit near 0 is on one side of relu in 16 bits and on the other in fp64: eager is the measure.
    eager = run(reference, case)
    for name, value in right.items():
        assert error(got[name], value) <= 1.2 * error(eager[name], value), name
        assert 1.2 * error(eager[name], value) < 0.05, "the measure would accept 5 % of error"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("boundaries", [False, True])
def test_packed_and_padded_input(padded, boundaries):
    case = make(padded=padded, boundaries=boundaries, norm="layer")
    check_all(run(packed_projection, case), exact(case), torch.float32)


def test_without_bias_and_weights_of_the_norm():
    case = make(norm="layer")
    for name in ("bias", "norm_weight", "norm_bias"):
        del case[name]
    check_all(run(packed_projection, case), exact(case), torch.float32)
    case = make(norm="layer")
    del case["norm_weight"]
    check_all(run(packed_projection, case), exact(case), torch.float32)


def test_rows_named_twice_add_their_gradients():
    case = make(rows=torch.tensor([3, 0, 3, 3, 7]), norm="rms", padded=False)
    check_all(run(packed_projection, case), exact(case), torch.float32)


def test_more_rows_than_a_block():
    x = torch.randn(2500, 8)
    case = {**make(norm="layer", width=8, padded=False), "x": x, "cu_seqlens": cu([2400, 0, 100])}
    case |= {"prefix": torch.randn(1, 40)}
    check_all(run(packed_projection, case), exact(case), torch.float32)


def test_large_means_do_not_cancel():
    case = make(norm="layer", mean=1000.0)
    check_all(run(packed_projection, case), exact(case), torch.float32, wider=30.0)


def test_cast():
    case = make(dtype=torch.float32, boundaries=True)
    got = packed_projection(**case, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    check(got, reference(**case), LIMITS[torch.bfloat16])


def test_no_worse_than_eager_in_the_same_precision():
    case = make(dtype=torch.bfloat16, norm="layer", boundaries=True, scale=1.7)
    got, eager, right = run(packed_projection, case), run(reference, case), exact(case)
    for name in right:
        assert error(got[name], right[name]) <= 1.2 * error(eager[name], right[name]), name


def test_boundaries_of_empty_sequences():
    case = make("edges", boundaries=True)
    y = packed_projection(**case)
    edges = with_boundaries(case["cu_seqlens"], 3).tolist()
    assert edges[-1] == y.shape[0]
    assert torch.equal(y[:2], case["prefix"])
    assert torch.equal(y[2:3], case["suffix"][0])
    assert torch.equal(y[edges[3] : edges[3] + 2], case["prefix"])


def test_no_rows():
    case = make(rows=torch.zeros(0, dtype=torch.long), padded=False)
    got = run(packed_projection, case)
    assert got["y"].shape == (0, 40)
    assert not got["d_weight"].any()


def test_nan_outside_the_rows_is_not_read():
    case = make()
    unread = torch.ones(case["x"].shape[:2], dtype=torch.bool).view(-1)
    unread[case["rows"]] = False
    case["x"].view(-1, 24)[unread] = torch.nan
    got = run(packed_projection, case)
    assert all(value.isfinite().all() for value in got.values())


def test_only_wanted_gradients_are_made():
    case = make(norm="layer")
    y = packed_projection(**{**case, "weight": case["weight"].clone().requires_grad_()})
    y.sum().backward()
    assert case["x"].grad is None
    with torch.no_grad():
        assert not packed_projection(**case).requires_grad


def test_bitwise_repeatable_and_independent_of_what_empty_holds():
    case = make(dtype=torch.bfloat16, norm="layer", hidden=48, activation="silu", boundaries=True)
    same_bits(lambda: run(packed_projection, case))


@pytest.mark.parametrize("part", range(5))
def test_random_packs(part):
    """Property: on 500 random packs the result and all gradients are the reference's."""
    worst = 0.0
    for seed in range(part * 100, part * 100 + 100):
        g = torch.Generator().manual_seed(seed)
        sizes, _ = random_lengths(seed)
        width, out = (int(torch.randint(1, 9, (1,), generator=g)) for _ in range(2))
        n = sum(sizes) + 2
        case = {
            "x": torch.randn(n, width, generator=g, dtype=torch.float64),
            "weight": torch.randn(out, width, generator=g, dtype=torch.float64),
            "rows": torch.randint(0, n, (sum(sizes),), generator=g),
            "norm": [None, "rms", "layer"][seed % 3],
            "scale": 0.5,
            "eps": 1e-3,
            "cu_seqlens": cu(sizes),
            "prefix": torch.randn(1 + seed % 2, out, generator=g, dtype=torch.float64),
        }
        got, right = run(packed_projection, case), exact(case)
        worst = max(worst, *(largest_error(got[name], value) for name, value in right.items()))
    assert worst < 1e-9


CU = torch.tensor([0, 3, 8], dtype=torch.int32)
BAD = {
    "x must have shape": {"x": torch.randn(8)},
    r"x must have shape .* with E >= 1, got \(8, 0\)": {"x": torch.randn(8, 0), "weight": torch.randn(5, 0)},
    r"x must have shape .* with E >= 1, got \(2, 4, 0\)": {"x": torch.randn(2, 4, 0), "rows": torch.arange(3)},
    r"weight must have shape \(out, 6\) with out >= 1": {"weight": torch.randn(0, 6)},
    "rows is None, but x is padded": {"x": torch.randn(2, 4, 6)},
    r"weight must have shape \(out, 6\) with out >= 1, got \(5, 7\)": {"weight": torch.randn(5, 7)},
    r"bias must have shape \(5,\)": {"bias": torch.randn(6)},
    "rows must hold int32 or int64": {"rows": torch.ones(3)},
    "hidden_bias is given": {"hidden_bias": torch.randn(3)},
    "activation is 'tanh'": {"hidden_weight": torch.randn(6, 6), "activation": "tanh"},
    "prefix is given, but cu_seqlens is None": {"prefix": torch.randn(1, 5)},
    r"prefix must have shape \(n, 5\) or \(2, n, 5\)": {"prefix": torch.randn(1, 6), "cu_seqlens": CU},
    "cu_seqlens ends at 8, but there are 3 tokens|cu_seqlens ends at 8, but there are 3 rows": {
        "prefix": torch.randn(1, 5),
        "cu_seqlens": CU,
        "rows": torch.arange(3),
    },
    "cu_seqlens ends at 3, but there are 8 tokens": {"prefix": torch.randn(1, 5), "cu_seqlens": CU[:2]},
    "cu_seqlens must not descend": {"prefix": torch.randn(1, 5), "cu_seqlens": torch.tensor([0, 9, 8])},
    "norm is 'batch'": {"norm": "batch"},
    "scale is inf": {"scale": float("inf")},
    "rows holds 8": {"rows": torch.tensor([0, 8])},
    "weight is on meta": {"weight": torch.randn(5, 6, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = {"x": torch.randn(8, 6), "weight": torch.randn(5, 6), **BAD[message]}
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        packed_projection(**arguments)
