"""mtllm plan."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ..losses import DistillationWeights
from ..models import LoraSettings


@dataclass
class Plan:
    """Memory, speed and hours of a general adaptation with a frozen encoder, before renting anything: no weights, no
    allocation.

    Every operator of one training step runs on meta tensors; a roofline of the GPU turns FLOPs and bytes into seconds.
    Example: mtllm plan --encoder NLLB-600M --llm Llama-3-8B --gpu A100-80GB --gpus 8 --documents 2560000 --lengths web
    """

    encoder: str = "NLLB-600M"
    """Encoder of a family that `adapt` supports: a preset, a folder, or a hub name, of which only the config.json is
    downloaded."""
    llm: str = "Llama-3-8B"
    """LLM: a preset, a folder, or a hub name, of which only the config.json is downloaded."""
    gpu: str = "auto"
    """A100-80GB, A100-40GB, H100, H200 or B200; auto: this machine's, an H200 where it has none of them."""
    gpus: int = 1
    """How many of them."""
    documents: int = 2_560_000
    """Texts of the whole run; the paper's 10,000 steps of 256."""
    lengths: str = "web"
    """web, nli, fixed:N, or a file with one number of tokens per line."""
    max_length: int = 512
    """Longer texts are cut to this many tokens."""
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    lora: LoraSettings = field(default_factory=LoraSettings)
    base_weights: Literal["bf16", "int8", "nf4", "fp8"] = "bf16"
    """The LLM's linear layers: as `--base-weights` of `mtllm adapt`."""
    adam_8bit: bool = False
    """AdamW state in 8 bits, as `--optim adamw_8bit`."""
    offload_optimizer: bool = False
    """AdamW state in host memory between steps."""
    efficiency: float = 0.0
    """Share of the roofline that a step reaches; 0 takes 0.65, which is an assumption: no GPU has been measured yet."""
    measured_flops: float = 0.0
    """Measured bf16 GEMM rate in TFLOP/s, in place of the datasheet's share."""
    measured_bandwidth: float = 0.0
    """Measured copy bandwidth in TB/s, read plus written."""
    json: str = ""
    """Also write the plan to this file."""

    def run(self) -> None:
        from dataclasses import replace

        from rich.console import Console
        from rich.table import Table

        from .. import planning
        from ..models.encoders import family_of
        from .files import check_least, check_written

        check_least(self, gpus=1, documents=1, max_length=1)
        check_written(self, "json")
        for name in ("measured_flops", "measured_bandwidth"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0; 0 for the datasheet's"
                )
        if not 0 <= self.efficiency <= 1:
            raise ValueError(f"--efficiency {self.efficiency}: must be a share, above 0 and up to 1")
        name = planning.this_gpu() if self.gpu == "auto" else self.gpu
        device = planning.gpu(name)
        if self.measured_flops:
            device = replace(device, gemm=self.measured_flops * 1e12 / device.flops)
        if self.measured_bandwidth:
            device = replace(device, copy=self.measured_bandwidth * 1e12 / device.bandwidth)
        efficiency = self.efficiency or planning.EFFICIENCY
        encoder = planning.config(self.encoder, "encoder")
        family_of(encoder, self.encoder)
        spec = planning.StepSpec(
            encoder,
            planning.config(self.llm, "llm"),
            self.loss,
            self.lora,
            base="dense" if self.base_weights == "bf16" else self.base_weights,
            eight_bit_optimizer=self.adam_8bit,
            offloaded_optimizer=self.offload_optimizer,
        )
        lengths = planning.sample_lengths(self.lengths, limit=self.max_length)
        job = (lengths, device, self.documents, self.gpus, efficiency)
        columns = [
            planning.plan_ours(spec, *job),
            planning.plan_ours(replace(spec, checkpointing=True), *job),
            planning.plan_authors(spec, *job),
        ]
        rows = planning.table(columns, device, self.gpus)
        shown = Table(title=f"{self.encoder} into {self.llm}, {self.gpus} x {name}", title_justify="left")
        for index, name in enumerate(rows[0]):
            shown.add_column(name, justify="right" if index else "left")
        for row in rows[1:]:
            shown.add_row(*row)
        console = Console()
        console.print(shown)
        mean = sum(n for n, _ in lengths) / len(lengths)
        console.print(
            f"{self.documents:,} texts of {mean:.0f} tokens in the mean ({self.lengths}, cut at {self.max_length}). "
            f"Predicted, not measured: {device.gemm:.0%} of {device.flops / 1e12:.0f} TFLOP/s, {device.copy:.0%} of "
            f"{device.bandwidth / 1e12:.2f} TB/s, and {efficiency:.0%} of that roofline. The paper's code took "
            "about 22 h for 2,560,000 texts on 8 x A100-80GB.",
            soft_wrap=True,
            highlight=False,
        )
        if self.json:
            record = {
                "settings": asdict(self),
                "efficiency": efficiency,
                "columns": [{**asdict(c), "hours": c.hours if c.cost else None} for c in columns],
            }
            Path(self.json).write_text(json.dumps(record, indent=1), encoding="utf-8")
