"""The gate of linear_kl sees small errors of ours in bf16, at both ends of a run over several chunks; its floor multiplies numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mtllm_fast.kernels.linear_kl import reference
from mtllm_fast.kernels.tiles import LINEAR_KL_CPU

from benchmarks import registry
from benchmarks.cases import linear_kl
from benchmarks.cases import linear_kl_variants as variants
from benchmarks.cases.linear_kl import CASE, EDGE
from benchmarks.common import relative_error

ROWS = 2 * LINEAR_KL_CPU.chunk_rows + 100


def problem(rows: int = ROWS, dtype: torch.dtype = torch.bfloat16, **options):
    return CASE.make(rows, 32, 300, dtype=dtype, device="cpu", **options)


@pytest.mark.parametrize("options", [{}, {"masked": 0.5}, {"train_head": True}])
@pytest.mark.parametrize("rows", [20, 48, 64, 600])
def test_what_is_wanted_is_the_gradient_of_the_whole_run(rows: int, options: dict) -> None:
    p = problem(rows, torch.float32, **options)
    h, w = (x.detach().double().requires_grad_() for x in (p.h_s, p.w))
    total, _, _ = reference(h, w, p.h_t.double(), row_weight=p.mask)
    (total / p.valid).backward()
    found = linear_kl.exact(p)
    assert found.keys() == {"loss", "first rows", "last rows"} | ({"head_gradient"} if p.w.requires_grad else set())
    expected = {
        "loss": total / p.valid,
        "first rows": h.grad[:EDGE],
        "last rows": h.grad[-EDGE:],
        "head_gradient": w.grad,
    }
    for key, value in found.items():
        assert relative_error(value, expected[key].detach()) < 1e-12, key
        assert float(value.norm()) > 0


@pytest.mark.parametrize("name", ["ours", "ours-moments", "ours-moments-uncached"])
@pytest.mark.parametrize("where", ["everywhere", "in the last chunk", "in a row"])
def test_a_small_error_of_ours_is_seen_in_bf16(monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    p, right = problem(), CASE.variants[name]
    want = registry.wanted(CASE, p)
    assert registry.gate(CASE, name, p, "bf16", want)[0] == "pass"
    rows = linear_kl.small(p).rows
    assert LINEAR_KL_CPU.chunk_rows * 2 < rows < ROWS and rows % LINEAR_KL_CPU.chunk_rows  # three, the last not full

    def wrong(q):
        out = right.run(q)
        part, factor = {
            "everywhere": (slice(None), 1.015),
            "in the last chunk": (slice(2 * LINEAR_KL_CPU.chunk_rows, None), 1.015),
            "in a row": (slice(-3, -2), 1.2),
        }[where]
        out["gradient"][part] *= factor
        return out

    monkeypatch.setitem(CASE.variants, name, replace(right, run=wrong))
    assert registry.gate(CASE, name, p, "bf16", want)[0] == "fail"


def test_rounded_logits_pass_as_a_baseline_and_never_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    assert registry.gate(CASE, "unfused", p, "bf16")[0] == "pass"
    for name in ("ours", "ours-moments"):
        monkeypatch.setitem(CASE.variants, name, replace(CASE.variants[name], run=CASE.variants["unfused"].run))
        assert registry.gate(CASE, name, p, "bf16")[0] == "fail"


@pytest.mark.parametrize("rows", [24, 40])
def test_the_floor_multiplies_numbers_and_not_what_memory_holds(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    p, seen = problem(rows), []
    product = variants.mm_f32

    def mm(a, b, out):
        seen.append((a.clone(), b))
        return product(a, b, out=out)

    def empty(*shape, **options):
        return torch.full(shape[0] if len(shape) == 1 else shape, float("nan"), **options)

    monkeypatch.setattr(variants, "mm_f32", mm)
    monkeypatch.setattr(torch, "empty", empty)
    for _ in range(2):
        variants.gemms_in_chunks(p, 16)
    monkeypatch.undo()
    assert all(bool(a.isfinite().all()) for a, _ in seen)
    gradients = [a for a, b in seen if b is p.w]
    assert [len(a) for a in gradients] == [16, rows - 16, 16, rows - 16] if rows < 32 else [16, 16, 8, 16, 16, 8]
    assert all(len(a.unique()) > 500 and a.dtype == p.w.dtype for a in gradients)
    assert torch.equal(gradients[0], gradients[len(gradients) // 2])  # made once, not within the time


def test_problems_are_made_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a billion numbers of a head are not made on the host and copied."""
    devices = []
    for name in ("randn", "rand"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *s, make=make, **o: (devices.append(o.get("device")), make(*s, **o))[1])
    variants.make_problem(4, 8, 16, torch.float32, "cpu", masked=0.5)
    assert len(devices) == 5 and set(devices) == {"cpu"}


def test_predictions_are_of_the_gpu_that_is_named() -> None:
    """The audit's own arithmetic: three GEMMs of 8192 x 4096 x 128256, and 18 bytes a logit."""
    for gpu, flops, copied in (("H200", 791.2e12, 4.32e12), ("H100", 791.2e12, 3.015e12)):
        by = {(r.size, r.variant): r for r in linear_kl.predictions(gpu)}
        found = by["8192x4096x128256", "ours"]
        floor = 1e3 * 3 * 2 * 8192 * 4096 * 128256 / flops
        assert found.device == f"NVIDIA {gpu}"
        assert found.floor_ms == pytest.approx(floor)
        assert found.notes == f"not measured; predicted {floor + 1e3 * 18 * 8192 * 128256 / copied:.1f} ms"
    with pytest.raises(ValueError, match="'H101'"):
        linear_kl.predictions("H101")
