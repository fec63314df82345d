"""Writes the gradient of one step over all of `tests.tiny.LINES`, packed as asked; run alone or under torchrun.

python -m tests.training.step_gradient ENCODER LLM FOLDER TOKENS-PACKS_PER_PROCESS[-per-pack] ...

Each of these goes to FOLDER/<its name>.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from mtllm_fast.data import PackedDataset, TextRow
from mtllm_fast.losses import DistillationLoss, DistillationWeights
from mtllm_fast.models import MTLLM, LoraSettings
from mtllm_fast.training.config import OptimSettings
from mtllm_fast.training.processes import ends_process
from mtllm_fast.training.stage import Stage
from mtllm_fast.training.trainer import PackedTrainer
from tests.tiny import LINES


class _Capture(TrainerCallback):
    def __init__(self, out: str) -> None:
        self.out = out

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            names = {
                n.removeprefix("module."): p.grad.contiguous()
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            save_file(names, self.out)


class PerPackTrainer(PackedTrainer):
    """The negative control: every pack is divided by its own counts, and the packs are averaged."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own = {name: count * self.args.gradient_accumulation_steps for name, count in model.counts(inputs).items()}
        return super().compute_loss(model, inputs, return_outputs, own)


def gradient(encoder: str, llm: str, folder: str, name: str) -> None:
    tokens, accumulation, *kind = name.split("-", 2)
    torch.manual_seed(0)
    student = MTLLM.stack(encoder, llm, lora=LoraSettings(dropout=0.0), dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if "lora_B" in parameter_name:  # starts at zero, which would hide half of the gradient
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    rows = [TextRow(line) for line in (*LINES, *LINES[:2])]
    student.tokenizer.max_mt_tokens = student.tokenizer.max_llm_tokens = 28
    dataset = PackedDataset(rows, student.tokenizer, max_tokens=int(tokens))
    step = Stage(
        student, DistillationLoss(DistillationWeights(pooled_mse=1.0, paired_mse=0.5, kl=0.3, temperature=2.0))
    )
    optim = OptimSettings(
        max_steps=1, tokens=int(tokens), max_length=28, gradient_accumulation=int(accumulation), clip=0.0, progress=False, report_to="none",
        device="cpu",
    )  # fmt: skip
    trainer_class = PerPackTrainer if kind == ["per-pack"] else PackedTrainer
    trainer = trainer_class(step, dataset, optim, Path(folder) / f"{name}-run", steps=1)
    trainer.add_callback(_Capture(str(Path(folder) / f"{name}.safetensors")))
    trainer.run(resume=False)
    slots = int(accumulation) * trainer.args.world_size
    assert slots - 1 <= dataset.counters.packs <= slots, (
        f"{dataset.counters.packs} packs do not fill one step of {slots}"
    )


def main() -> None:
    with ends_process():
        for name in sys.argv[4:]:
            gradient(*sys.argv[1:4], name)


if __name__ == "__main__":
    main()
