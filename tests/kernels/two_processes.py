"""What two processes do in the tests of the ops: gradients under DDP and FSDP2 are those of the whole batch in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from mtllm_fast.kernels import LinearKL, distillation_loss, packed_projection
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mtllm_fast.training.processes import ends_process


class WithKL(nn.Module):
    """A layer, and the KL over a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.kl = nn.Linear(16, 16), nn.Linear(16, 64), LinearKL(temperature=2.0)

    def forward(self, x: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.kl(self.body(x), self.head.weight, teacher, bias_s=self.head.bias)


class Projected(nn.Module):
    """The projection with all that it can train, a layer, and the joint loss with a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.body = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 16)
        self.bos = nn.Parameter(torch.randn(1, 16))
        self.head = nn.Linear(16, 40)

    def forward(self, x: Tensor, cu: Tensor, teacher: Tensor, cu_t: Tensor, rows: Tensor) -> Tensor:
        norm = {"norm": "layer", "norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
        y = packed_projection(x, self.up.weight, self.up.bias, **norm, cu_seqlens=cu, prefix=self.bos)
        ends, pairs = {"cu_seqlens_s": cu_t, "cu_seqlens_t": cu_t}, {"rows_s": rows, "rows_t": rows}
        head = {"head": self.head.weight, "head_bias": self.head.bias}
        terms = distillation_loss(self.body(y), teacher, **ends, paired=True, **pairs, **head)
        return sum(value for value, _ in terms)


def agree(student: type[nn.Module], loss: Callable[[nn.Module, int, int], Tensor], texts: int) -> None:
    """`loss` of a model and the first and last text: the gradients of two halves are those of all `texts`."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return student()

    whole, rank, half = build(), dist.get_rank(), texts // 2
    loss(whole, 0, texts).backward()
    for wrap in ("ddp", "fsdp2"):
        model = build()
        wrapped = DistributedDataParallel(model) if wrap == "ddp" else fully_shard(model)
        (loss(wrapped, rank * half, (rank + 1) * half) * dist.get_world_size()).backward()
        for (name, p), q in zip(model.named_parameters(), whole.parameters()):
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert q.grad.abs().sum() > 0
            torch.testing.assert_close(grad, q.grad, rtol=1e-4, atol=1e-7, msg=f"{wrap} {name}")
    print("rank", rank, "ok")
    with ends_process():
        pass


def linear_kl() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    x, teacher = torch.randn(12, 16), torch.randn(12, 16)

    def loss(model: nn.Module, first: int, last: int) -> Tensor:
        total, count = model(x[first:last], teacher[first:last])
        if last - first < len(x):
            dist.all_reduce(count)
        return total / count

    agree(WithKL, loss, 12)


def distillation() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    x, teacher = torch.randn(12, 8), torch.randn(16, 16)

    def loss(model: nn.Module, first: int, last: int) -> Tensor:
        cu, texts = torch.arange(last - first + 1), last - first
        mine = x[first * 3 : last * 3], cu * 3, teacher[first * 4 : last * 4], cu * 4
        return model(*mine, torch.arange(0, texts * 4, 2))

    agree(Projected, loss, 4)
