"""Self-distillation in two passes of one LLM, or in one pass over student and teacher rows together: which is faster?

    python -m benchmarks.joint_pass --threads 1 --json benchmarks/results/cpu/joint_pass.json

two-pass      teacher rows without adapters and without a graph, then student rows with adapters, forward and backward.
joint-masked  one pack of both, adapters masked to the student's rows; autograd goes back through all rows.
joint-shared  the same, every linear layer of the LLM a `lora_linear`: one base GEMM for all rows, adapters and backward
              on the student's rows only.

A small random Llama with LoRA on all linear layers, pooled and paired MSE. Gradients of adapters and of the student's
embeddings must agree to 1e-6 in fp64 before a time (in fp32) is reported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mtllm_fast.kernels import distillation_loss
from torch import Tensor, nn

from .common import (
    Record,
    commit,
    device_name,
    interleaved,
    peak_incremental_mib,
    percentile,
    relative_error,
    versions,
    write,
)
from mtllm_fast.data import PackedBatch
from mtllm_fast.models.adapters import LoraSettings
from mtllm_fast.models.llm import PackedLLM

SHAPES = {"wide": (768, 2, 2048), "deep": (256, 6, 688)}  # width, layers, width of the MLP
TEXTS, LENGTH, VOCAB = 12, 32, 1000


class LoraLinear(torch.autograd.Function):
    """y = x wᵀ, plus scale · (x aᵀ) bᵀ on the first `split` rows, which alone are differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, split: int) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        y = flat @ w.t()
        low = flat[:split] @ a.t()
        y[:split].addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat[:split], low, w, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, w, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])[: x.shape[0]]
        d_low = ctx.scale * (dy @ b)
        dx = x.new_zeros(ctx.shape)
        rows = dx.view(-1, x.shape[1])[: x.shape[0]]
        torch.mm(dy, w, out=rows)
        rows.addmm_(d_low, a)
        return dx, None, d_low.t() @ x, ctx.scale * (dy.t() @ low), None, None


class Problem:
    """One LLM, student embeddings and teacher tokens of the same texts."""

    def __init__(self, width: int, layers: int, mlp: int, dtype: torch.dtype = torch.float32) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=VOCAB, max_position_embeddings=2048,
        )  # fmt: skip
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
        self.embeds = torch.randn(self.split, width, dtype=dtype).mul_(0.02).requires_grad_()
        self.rows = torch.arange(self.split)
        self.trained = [self.embeds, *(p for p in self.llm.parameters() if p.requires_grad)]

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        terms = distillation_loss(
            student, teacher, cu_seqlens_s=self.student.cu_seqlens, cu_seqlens_t=self.teacher.cu_seqlens, paired="mse",
            rows_s=self.rows, rows_t=self.rows, rows_sorted=True,
        )  # fmt: skip
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


def joint_shared(p: Problem) -> list[Tensor]:
    def forward(layer: Any, x: Tensor) -> Tensor:
        a, b = layer.lora_A["student"].weight, layer.lora_B["student"].weight
        return LoraLinear.apply(x, layer.base_layer.weight, a, b, layer.scaling["student"], p.split)

    for layer in p.llm._tuned:
        layer.forward = partial(forward, layer)
    try:
        return p.finish(p.loss(*p.joint_states()))
    finally:
        for layer in p.llm._tuned:
            del layer.forward


VARIANTS: dict[str, Callable[[Problem], list[Tensor]]] = {
    "two-pass": two_pass,
    "joint-masked": joint_masked,
    "joint-shared": joint_shared,
}


def memory_here(shape: str, name: str) -> float:
    VARIANTS[name](Problem(64, 1, 96))
    problem = Problem(*SHAPES[shape])
    return peak_incremental_mib(lambda: VARIANTS[name](problem), "cpu")


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 when a gradient differs."""
    parser = argparse.ArgumentParser(prog="benchmarks.joint_pass", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(memory_here(*options.memory_of.split()))
        return 0
    records = []
    for shape, (width, layers, mlp) in SHAPES.items():
        # in fp64, so that the comparison is of the maths and not of the order of rounding
        exact = Problem(width, layers, mlp, torch.float64)
        right = two_pass(exact)
        errors = {name: max(relative_error(a, b) for a, b in zip(run(exact), right)) for name, run in VARIANTS.items()}
        problem = Problem(width, layers, mlp)
        times = interleaved({n: partial(run, problem) for n, run in VARIANTS.items()}, "cpu", options.repeats)
        for name in VARIANTS:
            sizes = {"T": problem.split, "D": width, "layers": layers, "mlp": mlp}
            verdict = "pass" if errors[name] <= 1e-6 else "fail"
            record = Record(f"distillation step, {shape}", sizes, "fp32", device_name("cpu"), name, verdict)
            record.gate_detail, record.versions, record.commit = {"gradient": errors[name]}, versions(), commit()
            if verdict == "pass":
                values = times[name]
                record.time_ms, record.time_ms_p20, record.time_ms_p80 = (
                    percentile(values, q) for q in (0.5, 0.2, 0.8)
                )
                command = [sys.executable, "-m", "benchmarks.joint_pass", "--memory-of", f"{shape} {name}"]
                command += ["--threads", str(torch.get_num_threads())]
                done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
                record.peak_incremental_mib = json.loads(done.stdout.splitlines()[-1])
            records.append(record)
            print(shape, name, verdict, errors[name], record.time_ms, record.peak_incremental_mib, flush=True)
    if options.json:
        write(options.json, records)
    return int(any(r.gate == "fail" for r in records))


if __name__ == "__main__":
    sys.exit(main())
