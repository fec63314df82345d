"""Self-distillation in two passes of one LLM, or in one pass over student and teacher rows together: which is faster?

    python -m benchmarks.cases.joint_pass --threads 1 --json F.json

two-pass      teacher rows without adapters and without a graph, then student rows with adapters, forward and backward.
joint-masked  one pack of both, adapters masked to the student's rows; autograd goes back through all rows.
joint-shared  the same, every linear layer of the LLM a `lora_linear`: one base GEMM for all rows, adapters and backward
              on the student's rows only.

A small random Llama with LoRA on all linear layers, pooled and paired MSE. Gradients of adapters and of the student's
embeddings must agree with two passes in fp64 before a time is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mtllm_fast.kernels import distillation_loss
from torch import Tensor, nn

from mtllm_fast.data import PackedBatch
from mtllm_fast.models.adapters import LoraSettings
from mtllm_fast.models.llm import PackedLLM

from ..models import llama
from ..registry import Case, Variant, Work, register
from ..run import main
from .lora import SharedLora

TEXTS, LENGTH, VOCAB = 12, 32, 1000


class Problem:
    """One LLM, student embeddings and teacher tokens of the same texts."""

    def __init__(self, width: int, layers: int, mlp: int, *, dtype: torch.dtype, device: str) -> None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        self.sizes = {"width": width, "layers": layers, "mlp": mlp}
        config = llama(width, layers, mlp, VOCAB, heads=4, max_position_embeddings=2048)
        self.llm = PackedLLM(LlamaForCausalLM(config).eval())
        self.llm.add_adapter(LoraSettings(dropout=0.0))
        for name, parameter in self.llm.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.02)
        self.llm.to(dtype)
        lengths = [LENGTH // 2 + 2 * i for i in range(TEXTS)]
        ids = [torch.randint(0, VOCAB, (n,)).tolist() for n in lengths]
        self.student, self.teacher = (PackedBatch.from_sequences(ids) for _ in range(2))
        self.both = PackedBatch.from_sequences(ids + ids)
        self.split = self.student.num_tokens
        self.embeds = torch.randn(self.split, width).mul_(0.02).to(dtype).requires_grad_()
        self.rows = torch.arange(self.split)
        self.trained = [self.embeds, *(p for p in self.llm.parameters() if p.requires_grad)]

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        terms = distillation_loss(
            student,
            teacher,
            cu_seqlens_s=self.student.cu_seqlens,
            cu_seqlens_t=self.teacher.cu_seqlens,
            paired=True,
            rows_s=self.rows,
            rows_t=self.rows,
            rows_sorted=True,
        )
        assert terms.pooled_mse is not None and terms.paired_mse is not None
        return terms.pooled_mse[0] / terms.pooled_mse[1] + terms.paired_mse[0] / terms.paired_mse[1]

    def finish(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.trained))

    def joint_states(self) -> tuple[Tensor, Tensor]:
        tokens = self.llm.model.get_input_embeddings()(self.teacher.input_ids)
        states = self.llm(self.both, embeds=torch.cat([self.embeds, tokens]))
        return states[: self.split], states[self.split :].detach()


def two_pass(p: Problem) -> list[Tensor]:
    with torch.no_grad(), p.llm.adapter(None):
        teacher = p.llm(p.teacher)
    return p.finish(p.loss(p.llm(p.student, embeds=p.embeds), teacher))


def joint_masked(p: Problem) -> list[Tensor]:
    mask = p.embeds.new_zeros(p.both.num_tokens, 1)
    mask[: p.split] = 1.0
    hooks = [layer.lora_B["student"].register_forward_hook(lambda _m, _i, out: out * mask) for layer in p.llm._tuned]
    try:
        return p.finish(p.loss(*p.joint_states()))
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def shared_products(llm: Any, split: int) -> Iterator[None]:
    """Inside the block every adapted layer takes all rows in one product, with the adapter's on the first `split`."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        a, b = (m["student"].weight.to(x.dtype) for m in (layer.lora_A, layer.lora_B))
        return SharedLora.apply(x, layer.base_layer.weight, a, b, layer.scaling["student"], split)

    for layer in llm._tuned:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in llm._tuned:
            del layer.forward


def joint_shared(p: Problem) -> list[Tensor]:
    with shared_products(p.llm, p.split):
        return p.finish(p.loss(*p.joint_states()))


def named(p: Problem, gradients: list[Tensor]) -> dict[str, Tensor]:
    """Gradient of the embeddings, and of all adapters together."""
    return {"embeds": gradients[0], "adapters": torch.cat([g.flatten() for g in gradients[1:]])}


def exact(p: Problem) -> dict[str, Tensor]:
    """Two passes in fp64."""
    return named(p, two_pass(Problem(**p.sizes, dtype=torch.float64, device="cpu")))


def work(p: Problem) -> Work:
    """Products of the layers: teacher forward, student forward and gradient of the inputs."""
    per_row = 2.0 * sum(m.base_layer.weight.numel() for m in p.llm._tuned)
    return Work(0.0, per_row * (p.teacher.num_tokens + 2 * p.split))


register(
    Case(
        name="joint_pass",
        about="self-distillation in two passes of one LLM, or in one pass over student and teacher rows",
        make=Problem,
        sizes={
            "quick": ({"label": "small", "width": 128, "layers": 2, "mlp": 344},),
            "cpu": (
                {"label": "wide", "width": 768, "layers": 2, "mlp": 2048},
                {"label": "deep", "width": 256, "layers": 6, "mlp": 688},
            ),
            "cuda": (),
        },
        variants={
            "two-pass": Variant(two_pass, named, ours=True, devices=("cpu",)),
            "joint-masked": Variant(joint_masked, named, devices=("cpu",)),
            "joint-shared": Variant(joint_shared, named, devices=("cpu",)),
        },
        reference=exact,
        tolerance={"fp32": 1e-4},
        shape=lambda p: {"T": p.split, "D": p.sizes["width"], "layers": p.sizes["layers"], "mlp": p.sizes["mlp"]},
        warm={"width": 64, "layers": 1, "mlp": 96},
        work=work,
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("joint_pass",), prog="benchmarks.cases.joint_pass"))
