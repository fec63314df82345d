"""What the Trainer of transformers is told."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from .config import OptimSettings
from .engines import Engine, engine_arguments, optimizer_name


def training_arguments(
    optim: OptimSettings, folder: Path, steps: int, validate_steps: int | None, engine: Engine = "one"
) -> TrainingArguments:
    """Map `OptimSettings` to `TrainingArguments`."""
    report: str | list[str] = "none"
    if optim.report_to == "auto":
        report = [name for name, module in (("tensorboard", "tensorboard"),) if find_spec(module)]
        if find_spec("wandb") and ("WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ):
            report.append("wandb")
    options = engine_arguments(engine)
    if validate_steps:
        options |= {
            "eval_strategy": "steps",
            "eval_steps": validate_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": "selection",
            "greater_is_better": True,
        }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=optim.lr,
        lr_scheduler_type="linear",
        warmup_steps=round(optim.warmup * steps),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=optim.gradient_accumulation,
        optim=optimizer_name(optim),
        bf16=bool(optim.bf16),
        seed=optim.seed,
        logging_steps=optim.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=validate_steps or optim.save_steps,
        save_total_limit=optim.keep,
        ignore_data_skip=True,
        remove_unused_columns=False,
        report_to=report,
        disable_tqdm=not (optim.progress and sys.stderr.isatty()),
        use_cpu=optim.device == "cpu" or not torch.cuda.is_available(),
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are constants; without it a pack can be split on one process alone
        **options,
    )
