"""Sharded parameters (DTensor) as arguments: constants are gathered, trained ones are refused, and the way out is right."""

from __future__ import annotations

WORKER = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.fsdp import fully_shard
from mtllm_fast.kernels import (distillation_loss, linear_kl, packed_projection, paired_mse, pooled_mse, segment_mean,
                                teacher_moments)
from mtllm_fast.training.processes import ends_process

dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(1)
x, t, y = torch.randn(12, 16), torch.randn(12, 16), torch.randn(12, 8)
P = {"head": torch.randn(40, 16), "bias": torch.randn(40), "up": torch.randn(16, 8), "up_bias": torch.randn(16), "low": torch.randn(8, 8),
     "low_bias": torch.randn(8), "n_weight": torch.rand(8) + 0.5, "n_bias": torch.randn(8), "bos": torch.randn(2, 16)}

def cu(rows):
    return torch.arange(0, rows.shape[0] + 1, 3)

def direction(z):
    return (z * torch.linspace(-1, 1, z.shape[1])).sum()

def projected(y, name, p):
    options = {"weight": P["up"], "norm": "layer", "cu_seqlens": cu(y), **{name: p}}
    if name.startswith("hidden"):
        options = {"hidden_weight": P["low"], "activation": "silu", **options}
    return direction(packed_projection(y, **options))

# (argument, parameter, loss of this process's rows given that argument)
CASES = [
    ("w_s", "head", lambda x, t, y, p: linear_kl(x, p, t, P["head"])[0]),
    ("bias_s", "bias", lambda x, t, y, p: linear_kl(x, P["head"], t, P["head"], bias_s=p, divergence="jsd")[0]),
    ("head", "head", lambda x, t, y, p: distillation_loss(
        x, t, pooled=False, rows_s=torch.arange(6), rows_t=torch.arange(6), head=p).kl[0]),
    ("head_bias", "bias", lambda x, t, y, p: distillation_loss(
        x, t, pooled=False, rows_s=torch.arange(6), rows_t=torch.arange(6), head=P["head"], head_bias=p).kl[0]),
] + [
    (name, key, lambda x, t, y, p, name=name: projected(y, name, p))
    for name, key in {"weight": "up", "bias": "up_bias", "hidden_weight": "low", "hidden_bias": "low_bias",
                      "norm_weight": "n_weight", "norm_bias": "n_bias", "prefix": "bos", "suffix": "bos"}.items()
]
if rank == 0:
    print(len(CASES), "cases")
mine = slice(rank * 6, rank * 6 + 6)
own, half = (x[mine], t[mine], y[mine]), slice(0, 6)
for argument, key, loss in CASES:
    whole = P[key].clone().requires_grad_()
    sum(loss(x[part], t[part], y[part], whole) for part in (slice(0, 6), slice(6, 12))).backward()
    assert whole.grad.abs().sum() > 0, argument
    sharded = distribute_tensor(P[key], mesh, [Shard(0)]).requires_grad_()
    try:
        loss(*own, sharded)
    except ValueError as error:
        message = str(error)
        assert message.startswith(argument + " is a sharded parameter") and "full_tensor(grad_placements" in message
        assert chr(10) not in message
    else:
        raise AssertionError(argument + " was accepted")
    # What the message says: rows of its own in every process ...
    loss(*own, sharded.full_tensor(grad_placements=[Partial()])).backward()
    torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-5, msg=argument)
    # ... or the same rows in all; and the wrong one of the two is off by a multiple, so this comparison would see it.
    sharded.grad, whole.grad = None, None
    loss(x[half], t[half], y[half], sharded.full_tensor(grad_placements=[Replicate()])).backward()
    loss(x[half], t[half], y[half], whole).backward()
    torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-5, msg=argument)
    # Constants are gathered.
    with torch.no_grad():
        assert torch.equal(loss(*own, sharded), loss(*own, P[key])), argument
    assert torch.equal(loss(*own, sharded.detach()), loss(*own, P[key])), argument
# The head of someone's own loop, as fully_shard leaves it outside of a forward.
head = nn.Linear(16, 40)
fully_shard(head)
try:
    linear_kl(*own[:1], head.weight, own[1])
except ValueError as error:
    assert "w_s is a sharded parameter" in str(error)
else:
    raise AssertionError("accepted")
# Teachers are constants whatever they require.
teacher_head, teacher_bias = (distribute_tensor(P[k], mesh, [Shard(0)]).requires_grad_() for k in ("head", "bias"))
got = linear_kl(x, P["head"] * 0.5, t, teacher_head, bias_t=teacher_bias)[0]
assert torch.equal(got, linear_kl(x, P["head"] * 0.5, t, P["head"], bias_t=P["bias"])[0])
assert torch.equal(teacher_moments(t, teacher_head, bias_t=teacher_bias).m, teacher_moments(t, P["head"], bias_t=P["bias"]).m)
# States are those of one process.
spread, rows = distribute_tensor(x, mesh, [Shard(0)]), torch.arange(3)
for call in (lambda: linear_kl(spread, P["head"], t), lambda: linear_kl(x, P["head"], spread),
             lambda: segment_mean(spread, cu(x)), lambda: pooled_mse(x, spread, cu(x), cu(t)),
             lambda: paired_mse(spread, t, rows, rows), lambda: packed_projection(spread, P["head"]),
             lambda: teacher_moments(spread, P["head"])):
    try:
        call()
    except ValueError as error:
        assert "is a DTensor, but the ops take the rows of one process" in str(error)
    else:
        raise AssertionError("a DTensor of states was accepted")
print("rank", rank, "ok")
with ends_process():
    pass
"""


def test_every_parameter_of_every_op(forked):
    for rank, out in enumerate(forked.group(code=WORKER)):
        assert f"rank {rank} ok" in out
