"""How an op is declared: its schema, calls by keyword, gradients by name, and what goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from mtllm_fast.kernels.op import Op, Registered
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Op[Tensor]):
    """x @ w * by + shift."""

    x: Tensor
    by: float = 1.0
    w: Tensor
    shift: Tensor | None = None

    def cpu(self) -> Tensor:
        y = self.x @ self.w * self.by
        return y if self.shift is None else y + self.shift

    def fake(self) -> Tensor:
        return self.x.new_empty(self.x.shape[0], self.w.shape[1])

    def keep(self, output: Tensor):
        return {"x": self.x, "w": self.w, "by": self.by}

    @staticmethod
    def backward(kept, dy):
        asked.append(kept["needs"])
        dy_by = dy * kept["by"]
        return {wrong or "w": kept["x"].T @ dy_by, "x": dy_by @ kept["w"].T, "shift": dy.sum(0)}


asked: list[dict[str, bool]] = []
wrong = ""
affine = Registered(Affine, "test_affine", errors="affine")
X, W, SHIFT = torch.randn(4, 3), torch.randn(3, 2), torch.randn(2)


def test_the_schema_is_that_of_the_fields_without_defaults():
    assert affine.op._schema == "(Tensor x, float by, Tensor w, Tensor? shift) -> Tensor"
    assert torch.ops.mtllm_fast.test_affine.default(X, 2.0, W, None).equal(X @ W * 2.0)
    torch.library.opcheck(affine.op, affine.inputs(x=X.clone().requires_grad_(), w=W, by=3.0, shift=SHIFT))


def test_gradients_go_to_the_arguments_they_are_named_after():
    x, w, shift = (t.clone().requires_grad_() for t in (X, W, SHIFT))
    affine(shift=shift, w=w, x=x, by=2.0).sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(4, 2) @ W.T)
    torch.testing.assert_close(w.grad, 2 * X.T @ torch.ones(4, 2))
    torch.testing.assert_close(shift.grad, torch.full((2,), 4.0))
    affine(x=x, w=W).sum().backward()
    assert asked[-1] == {"x": True, "by": False, "w": False, "shift": False}


def test_a_name_that_is_no_argument_is_no_gradient(monkeypatch):
    monkeypatch.setitem(globals(), "wrong", "weight")
    with pytest.raises(AssertionError, match="weight"):
        affine(x=X.clone().requires_grad_(), w=W).sum().backward()


@pytest.mark.parametrize("arguments", [{"x": X}, {"x": X, "w": W, "bias": SHIFT}])
def test_missing_and_unknown_arguments(arguments):
    with pytest.raises(TypeError, match=r"test_affine.* takes .*'shift'"):
        affine(**arguments)
    with pytest.raises(TypeError):
        affine(X, W)


def test_autocast_does_not_reach_into_the_kernel():
    with torch.autocast("cpu", torch.bfloat16):
        assert (X @ W).dtype == torch.bfloat16  # control
        assert affine(x=X, w=W).dtype == torch.float32
