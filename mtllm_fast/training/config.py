"""Settings shared by every training stage, as typed dataclasses that the command line is made from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass
class OptimSettings:
    """How to train. A step is `gradient_accumulation` packs on every process.

    What is None is chosen by the device when a run starts (`automatic.settled`).
    """

    max_steps: int = 1000
    """Optimizer steps; -1 trains for `epochs` instead, 0 saves the model as it starts."""
    epochs: int = 1
    """Passes over the data, used where max_steps is -1."""
    lr: float = 2e-4
    """Peak learning rate of AdamW."""
    warmup: float = 0.01
    """Share of the steps over which the learning rate rises linearly; then it falls linearly to 0."""
    weight_decay: float = 0.01
    """Of AdamW."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    tokens: int | None = None
    """Token budget of one pack, on each side (MT tokens and LLM tokens). By default 4096; on a GPU 8192, or as many as
    fit."""
    max_rows: int | None = None
    """Most texts in one pack."""
    gradient_accumulation: int = 1
    """Packs per process and step."""
    parallel: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    """With several processes (torchrun, accelerate launch): ddp, the whole model on each; fsdp2, its weights spread
    over them; deepspeed, ZeRO-2. auto: what accelerate was configured for, else ddp."""
    max_length: int = 512
    """Longer texts are truncated to this many tokens by each tokenizer, and counted."""
    lookahead: int | None = None
    """Rows among which packs are chosen; by default as many as fill about 64 packs."""
    shuffle_buffer: int | None = None
    """Rows of a shuffle buffer before packing; 0 keeps the order of the files. By default 0 in `adapt`, and in the
    others a million: all rows of most tasks, whose files are often sorted by class."""
    bf16: bool | None = None
    """Mixed precision: bf16 autocast over fp32 trainable weights. By default on where a GPU multiplies bf16."""
    base_weights: Literal["auto", "fp32", "bf16", "int8", "nf4", "fp8"] = "auto"
    """Frozen base weights. auto: bf16 with `bf16` on a GPU, otherwise fp32. int8 (torchao), nf4 (bitsandbytes): linear
    layers of the LLM held so and multiplied in the activations' dtype. fp8 (a GPU of NVIDIA's of compute capability 8.9
    or newer): held and multiplied in fp8, 2 bytes a weight. The LM head and embeddings stay bf16 or fp32."""
    checkpointing: Literal["none", "full", "budget"] = "none"
    """Layers run again in backward instead of keeping activations: none, all, or as few as the budget allows."""
    activation_memory_gib: float = 0.0
    """Budget of "budget": what the LLM's layers may keep for the backward of one pack of `tokens` tokens."""
    compile: bool | None = None
    """torch.compile of the layers; the first steps are slow, other pack lengths compile nothing anew. By default on a
    GPU, where Liger does not serve."""
    liger: bool | None = None
    """Liger's RMSNorm, RoPE and SwiGLU in the LLM (GPU; for every model of its family in the process). By default on a
    GPU, where it is installed and knows the family."""
    optim: str = "adamw_torch"
    """Any optimizer name of transformers.TrainingArguments, e.g. adamw_8bit (bitsandbytes)."""
    offload_optimizer: bool = False
    """AdamW state that leaves the GPU for host memory when room is short (bitsandbytes' paged optimizers)."""
    seed: int = 42
    """Of starting weights, dropout and the order of texts."""
    workers: int | None = None
    """Processes that tokenise and pack. By default none; on a GPU up to 4, by the cores there are."""
    log_steps: int = 10
    """Steps between two lines of log.jsonl."""
    save_steps: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept on disk (at least 2, so that one is always complete)."""
    async_save: bool = True
    """Go on training while a checkpoint is brought to the disk."""
    bad_steps: int = 10
    """A step whose loss or gradient is not finite changes no weight; so many in a row end the run."""
    report_to: Literal["auto", "none"] = "auto"
    """auto: TensorBoard and W&B where installed (W&B only if it is configured)."""
    progress: bool = True
    """Show a progress bar; a line per log where stderr is no terminal."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.max_steps < 0 and not (self.max_steps == -1 and self.epochs >= 1):
            raise ValueError(f"max_steps={self.max_steps}: must be >= 0, or -1 with epochs >= 1")
        positive = ("lr", "gradient_accumulation", "max_length", "log_steps", "save_steps")
        for name in (*positive, "bad_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0")
        for name in ("tokens", "lookahead", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be > 0, or left out")
        for name in ("weight_decay", "clip", "workers", "activation_memory_gib"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: must be >= 0")
        if not self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: must be a finite number")
        if self.shuffle_buffer is not None and self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer={self.shuffle_buffer}: must be >= 0, or left out")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must be in [0, 2**32), which numpy's generator takes")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(get_args(kind))}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: must be a share in [0, 1)")
        if (self.checkpointing == "budget") != (self.activation_memory_gib > 0):
            raise ValueError(
                f"activation_memory_gib={self.activation_memory_gib}: must be > 0 with checkpointing='budget', "
                f"and not given with checkpointing={self.checkpointing!r}"
            )
        if self.keep < 2:
            raise ValueError(f"keep={self.keep}: at least 2 checkpoints are kept, so that one is always complete")
        if self.tokens is not None and self.max_length > self.tokens:
            raise ValueError(
                f"tokens={self.tokens}: must be at least max_length={self.max_length}, or one text may not fit a pack"
            )
