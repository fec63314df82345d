"""Every op under torch.func, and what it refuses: forward mode and second derivatives, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mtllm_fast.kernels import (
    distillation_loss,
    linear_ce,
    linear_kl,
    packed_projection,
    paired_mse,
    pooled_mse,
    segment_mean,
    teacher_moments,
)
from torch import Tensor
from torch.autograd import forward_ad

from tests.kernels.linear_kl_cases import check

# torch's own, of vmap's way with a Function
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
G = torch.Generator().manual_seed(0)
TEACHER, HEAD, BIAS = (torch.randn(*shape, generator=G) for shape in ((6, 8), (30, 8), (30,)))
CU, ROWS, SCALE = torch.tensor([0, 2, 6]), torch.tensor([0, 3, 3]), torch.rand(8, generator=G) + 0.5
TARGETS = torch.tensor([3, -100, 0, 29, 7, 7])
MOMENTS = teacher_moments(TEACHER, HEAD)


def projected(x: Tensor, w: Tensor, **options) -> Tensor:
    return packed_projection(x, w, norm="layer", cu_seqlens=CU, prefix=HEAD[:1, :1].expand(1, 30), **options)


# Scalar functions of states (6, 8) and of a parameter that is trained.
OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "linear_kl": (lambda x, p: linear_kl(x, p, TEACHER, HEAD, divergence="jsd")[0], HEAD * 0.9),
    "linear_kl bias": (lambda x, p: linear_kl(x, HEAD, TEACHER, HEAD, bias_s=p, row_weight=TEACHER[:, 0])[0], BIAS),
    "linear_ce": (lambda x, p: linear_ce(x, p, TARGETS, label_smoothing=0.1)[0], HEAD * 0.9),
    "linear_kl moments": (lambda x, p: linear_kl(x, HEAD, teacher=MOMENTS)[0] * p.sum(), SCALE),
    "segment_mean": (lambda x, p: segment_mean(x, CU).square().sum() * p.sum(), SCALE),
    "pooled_mse": (lambda x, p: pooled_mse(x, TEACHER, CU, CU)[0] * p.sum(), SCALE),
    "paired_mse": (lambda x, p: paired_mse(x, TEACHER, ROWS, ROWS)[0] * p.sum(), SCALE),
    "packed_projection": (lambda x, p: projected(x, p, bias=BIAS).square().sum(), HEAD),
    "packed_projection hidden": (
        lambda x, p: projected(x, HEAD, hidden_weight=p, activation="silu").square().sum(),
        HEAD[:8],
    ),
    "distillation_loss": (
        lambda x, p: sum(
            value
            for value, _ in distillation_loss(
                x, TEACHER, cu_seqlens_s=CU, cu_seqlens_t=CU, paired=True, rows_s=ROWS, rows_t=ROWS, head=p
            )
        ),
        HEAD,
    ),
}
X = torch.randn(6, 8, generator=G)
# Here the parameter acts outside of the op, where torch's own derivatives of any kind are right.
OUTSIDE = ("linear_kl moments", "segment_mean", "pooled_mse", "paired_mse")
ARGUMENTS = [(key, of) for key in OPS for of in ("states", "parameter") if of == "states" or key not in OUTSIDE]


@pytest.fixture(params=OPS)
def op(request) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    return OPS[request.param]


def eager(function, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    x, p = x.clone().requires_grad_(), p.clone().requires_grad_()
    return torch.autograd.grad(function(x, p), (x, p))


def test_grad_vjp_and_jacrev(op):
    function, p = op
    right = eager(function, X, p)
    for got in (
        torch.func.grad(function, (0, 1))(X, p),
        torch.func.vjp(function, X, p)[1](torch.tensor(1.0)),
        torch.func.jacrev(function, (0, 1))(X, p),
    ):
        for a, b in zip(got, right):
            check(a, b, 1e-6)


def test_gradients_per_example(op):
    function, p = op
    batch = torch.stack([X, 2 * X, -X])
    got = torch.func.vmap(torch.func.grad(function, (0, 1)), (0, None))(batch, p)
    for i, example in enumerate(batch):
        for a, b in zip(got, eager(function, example, p)):
            check(a[i], b, 1e-6)


@pytest.mark.parametrize(("key", "of"), ARGUMENTS)
def test_forward_mode_is_refused(key, of):
    function, p = OPS[key]
    at, other = (X, p) if of == "states" else (p, X)

    def along(value: Tensor) -> Tensor:
        return function(value, other) if of == "states" else function(other, value)

    def dual() -> None:
        with forward_ad.dual_level():
            along(forward_ad.make_dual(at, at))

    for call in (
        dual,
        lambda: torch.func.jvp(along, (at,), (at,)),
        lambda: torch.func.jacfwd(along)(at),
        lambda: torch.func.hessian(along)(at),
    ):
        with pytest.raises(NotImplementedError, match=rf"{key.split()[0]}.* has no forward-mode derivative"):
            call()


@pytest.mark.parametrize(("key", "of"), ARGUMENTS)
def test_second_derivatives_are_refused(key, of):
    function, p = OPS[key]
    index = 0 if of == "states" else 1

    def penalty() -> None:
        x, q = X.clone().requires_grad_(), p.clone().requires_grad_()
        loss = function(x, q)
        (gradient,) = torch.autograd.grad(loss, (x, q)[index], create_graph=True)
        # The loss keeps this differentiable even where the penalty's part would be lost in silence.
        (loss + gradient.square().sum()).backward()

    def of_the_square() -> None:
        leaves = X.clone().requires_grad_(), p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(*leaves) ** 2, leaves[index], create_graph=True)
        gradient.sum().backward()

    def grad_of_grad() -> None:
        torch.func.grad(lambda x, q: torch.func.grad(function, index)(x, q).sum(), index)(X, p)

    for call in (penalty, of_the_square, grad_of_grad):
        with pytest.raises(RuntimeError, match=rf"{key.split()[0]}.* has no second derivative"):
            call()


def test_create_graph_alone_changes_nothing(op):
    function, p = op
    x, q = X.clone().requires_grad_(), p.clone().requires_grad_()
    for a, b in zip(torch.autograd.grad(function(x, q), (x, q), create_graph=True), eager(function, X, p)):
        check(a, b, 1e-6)


def test_the_teacher_is_a_constant_under_transforms():
    assert not torch.func.grad(lambda t: linear_kl(X, HEAD, t)[0] + 0 * t.sum())(TEACHER).any()
    assert not torch.func.grad(lambda t: paired_mse(X, t, ROWS, ROWS)[0] + 0 * t.sum())(TEACHER).any()
