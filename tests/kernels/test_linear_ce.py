"""linear_ce on the CPU against fp64 and torch's own cross_entropy; what is left out, large logits, errors, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mtllm_fast.kernels import linear_ce, tiles
from mtllm_fast.kernels.linear_ce import CrossEntropy, cross_entropy, reference

from tests.kernels.ce_cases import exact, make, run
from tests.kernels.linear_kl_cases import LIMITS, check

OPTIONS = [
    {},
    {"bias": True, "rows": True},
    {"weights": True, "ignored": True},
    {"label_smoothing": 0.2, "bias": True},
    {"softcap": 2.0, "ignored": True, "rows": True},
    {"softcap": 3.0, "label_smoothing": 0.1, "bias": True, "rows": True, "weights": True},
    {"vocab_size": 290},
]


def compare(case: dict, limit: float) -> None:
    got, right = run(linear_ce, case), exact(case)
    for name, value in right.items():
        check(got[name], value, limit)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
def test_matches_fp64(options) -> None:
    case = make(**options)
    if "vocab_size" in options:
        case["targets"] %= 290
    compare(case, LIMITS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype) -> None:
    compare(make(dtype, bias=True, ignored=True, label_smoothing=0.1), LIMITS[dtype])


def test_the_reference_is_torchs_cross_entropy() -> None:
    case = make(torch.float64, bias=True, ignored=True, label_smoothing=0.1)
    right = F.cross_entropy(F.linear(case["h"], case["w"], case["bias"]), case["targets"], label_smoothing=0.1)
    total, count = linear_ce(**case)
    assert float(total / count) == pytest.approx(float(right), rel=1e-12)
    assert float(count) == int((case["targets"] != -100).sum())


@pytest.mark.parametrize("count", [1, 2, 257])
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 5000])
def test_sizes(count, vocab, monkeypatch) -> None:
    """One class, blocks that end within and at the vocabulary's end, chunks of a few rows."""
    monkeypatch.setattr(tiles, "LINEAR_KL_CPU", tiles.CpuChunks(chunk_rows=50, block_v=64, max_buffer_mib=512))
    case = make(count=max(count, 3), vocab=vocab)
    case |= {"h": case["h"][:count], "targets": case["targets"][:count]}
    if vocab > 1:
        compare(case, LIMITS[torch.float32])
        compare(case | {"label_smoothing": 0.3}, LIMITS[torch.float32])
    else:
        got = run(linear_ce, case)
        assert all(float(got[name].abs().max()) == 0 for name in ("total", "dh", "dw"))  # one class is certain


def test_what_is_left_out_is_not_read() -> None:
    """NaN in a row that nothing asks for, or whose target is ignored or weighs 0; ids beyond the vocabulary there."""
    case = make(ignored=True, weights=True)
    gone = (case["targets"] == -100) | (case["row_weight"] == 0)
    right = exact(case)
    case["h"][gone] = torch.nan
    got = run(linear_ce, case)
    for name in ("total", "dh", "dw", "values"):
        check(got[name], right[name], 1e-5)
    assert bool((got["dh"][gone] == 0).all())
    assert bool((got["values"][gone] == 0).all())


def test_nothing_to_learn() -> None:
    case = make()
    for targets in (torch.full_like(case["targets"], -100), case["targets"][:0]):
        got = run(linear_ce, {**case, "targets": targets, "h": case["h"][: len(targets)]})
        assert float(got["total"]) == float(got["count"]) == 0
        assert float(got["dw"].abs().sum()) == float(got["dh"].abs().sum()) == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_logits(sign) -> None:
    """Logits of 1e4 around the target: the gradient sums to 0 in every row, and value and gradient are fp64's."""
    g = torch.Generator().manual_seed(1)
    z = 300.0 * torch.randn(30, 64, generator=g)
    z[:, 20:32] = 1500.0 * sign + torch.randn(30, 12, generator=g)
    case = {"h": z, "w": torch.eye(64), "targets": torch.full((30,), 24)}
    got, right = run(linear_ce, case), exact(case)
    check(got["total"], right["total"], 1e-5)
    check(got["dh"], right["dh"], 2e-4)
    assert float(got["dh"].sum(1).abs().max()) < 1e-5


def test_near_convergence() -> None:
    """p(target) of 0.999 and more, in bf16: the gradient is a small difference, which bf16 logits would lose."""
    case = make(torch.bfloat16, width=64, vocab=500)
    with torch.no_grad():
        case["h"] = (case["w"][case["targets"]].float() * 6).to(torch.bfloat16)
    right = exact(case)
    assert float(right["values"].mean()) < 0.05
    check(run(linear_ce, case)["dh"], right["dh"], 5e-3)
    z = F.linear(case["h"].requires_grad_(), case["w"])
    (F.cross_entropy(z, case["targets"], reduction="sum") * 0.5).backward()
    wrong = case["h"].grad.double()
    assert float((wrong - right["dh"]).norm() / right["dh"].norm()) > 5e-3, "the control"


def test_a_class_that_cannot_be_said() -> None:
    case = make(bias=True)
    case["bias"][7] = -torch.inf
    case["targets"][case["targets"] == 7] = 8
    got, right = run(linear_ce, case), exact(case)
    check(got["total"], right["total"], 1e-5)
    check(got["dh"], right["dh"], 1e-5)
    assert float(got["dw"][7].abs().max()) == 0


def test_only_what_is_trained_gets_a_gradient() -> None:
    case = make(bias=True)
    h = case["h"].requires_grad_()
    linear_ce(**case)[0].backward()
    check(h.grad * 0.5, exact(case)["dh"], 1e-5)
    assert case["w"].grad is None
    with torch.no_grad():
        assert not linear_ce(**case)[0].requires_grad


def test_autocast_and_compile() -> None:
    case, right = make(), exact(make())
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_ce(**case)
    assert float(total) == pytest.approx(float(right["total"]), rel=1e-2)
    compiled = torch.compile(lambda h, w, t: linear_ce(h, w, t)[0], fullgraph=True, backend="aot_eager")
    assert float(compiled(case["h"], case["w"], case["targets"])) == pytest.approx(float(right["total"]), rel=1e-5)


def test_opcheck() -> None:
    case = make(bias=True, rows=True, weights=True)
    h, w, bias = (case[name].requires_grad_() for name in ("h", "w", "bias"))
    for needs in ((True, True, True), (True, False, False)):
        names = dict(zip(("need_dh", "need_dw", "need_db"), needs))
        inputs = {"h_s": h, "w_s": w if needs[1] else w.detach(), "bias_s": bias if needs[2] else bias.detach()}
        inputs |= {"rows_t": case["targets"], "rows_s": case["rows"], "row_weight": case["row_weight"]}
        torch.library.opcheck(cross_entropy.op, cross_entropy.inputs(**inputs, smoothing=0.1, softcap=4.0, **names))
    assert CrossEntropy.__doc__


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"targets": torch.zeros(22, dtype=torch.int64)}, ValueError, r"targets must have shape \(23,\)"),
        ({"targets": torch.zeros(23)}, TypeError, "targets must hold int64 or int32"),
        ({"targets": torch.full((23,), 301)}, IndexError, "targets holds 301"),
        ({"targets": torch.full((23,), -7)}, IndexError, "targets holds -7"),
        ({"rows": torch.full((23,), 23)}, IndexError, "^rows holds 23, but there are 23 of them"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"vocab_size": 400}, ValueError, "vocab_size is 400"),
        ({"num_valid": 24}, ValueError, "num_valid is 24"),
        ({"w": torch.randn(301, 15)}, ValueError, "h is 16 wide but w is 15 wide"),
        ({"w": torch.randn(301, 16).half()}, ValueError, "h is torch.float32 but w is torch.float16"),
        ({"bias": torch.randn(300)}, ValueError, r"bias must have shape \(301,\)"),
        ({"row_weight": torch.ones(22)}, ValueError, r"row_weight must have shape \(23,\)"),
    ],
)
def test_errors_name_the_argument(changes, error, said) -> None:
    with pytest.raises(error, match=said):
        linear_ce(**(make() | changes))


def test_reference_of_everything_left_out_is_finite() -> None:
    total, count, _ = reference(**{**make(), "targets": torch.full((23,), -100)})
    assert float(total) == float(count) == 0


@pytest.mark.parametrize("trained", ["w", "bias"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_part_of_the_head_alone_is_trained_over_several_blocks(trained, softcap, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "LINEAR_KL_CPU", tiles.CpuChunks(chunk_rows=4, block_v=64, max_buffer_mib=512))
    case = make(bias=True, label_smoothing=0.1) | ({} if softcap is None else {"softcap": softcap})
    right = exact(case)["dw" if trained == "w" else "db"]
    case[trained].requires_grad_()
    linear_ce(**case)[0].backward()
    check(case[trained].grad * 0.5, right, 1e-5)
