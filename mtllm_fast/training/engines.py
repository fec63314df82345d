"""Which engine shares the work of several processes (`distributed`), and which optimizer it gets."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

from packaging.version import Version

from .config import OptimSettings
from .processes import processes

log = logging.getLogger(__name__)

Engine = Literal["one", "ddp", "fsdp2", "deepspeed"]
# torch's own know spread weights
SPREAD_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
# what pages its state out of the GPU's memory, by what does not
PAGED = {
    "adamw_torch": "paged_adamw_32bit",
    "adamw_torch_fused": "paged_adamw_32bit",
    "adamw_8bit": "paged_adamw_8bit",
    "adamw_bnb_8bit": "paged_adamw_8bit",
}


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "y", "on")


def choose_engine(optim: OptimSettings) -> Engine:
    """The engine of this run, from `optim.parallel` and from what `accelerate launch` was configured with.

    Raises:
        ValueError: the two disagree, an engine cannot do what it is asked for, or its package is missing.
    """
    launched = "fsdp2" if _asked("ACCELERATE_USE_FSDP") else None
    launched = "deepspeed" if _asked("ACCELERATE_USE_DEEPSPEED") else launched
    asked = optim.parallel
    if launched and asked not in ("auto", launched):
        raise ValueError(f"parallel={asked!r}: but accelerate was launched with a configuration for {launched}")
    engine: str = launched or asked
    if processes() == 1:
        if engine not in ("auto", "ddp"):
            log.info("%s: there is one process, which holds everything", engine)
        return "one"
    if engine == "fsdp2":
        _check_fsdp2(optim, launched is not None)
        return "fsdp2"
    if engine == "deepspeed":
        if find_spec("deepspeed") is None:
            raise ValueError("DeepSpeed is asked for, but it is not installed: pip install 'mtllm-fast[deepspeed]'")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2"):
            raise ValueError(f"DeepSpeed ZeRO stage {stage}: 1 and 2 are known here; --parallel fsdp2 spreads weights")
        return "deepspeed"
    return "ddp"


def _check_fsdp2(optim: OptimSettings, launched: bool) -> None:
    if launched and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("fsdp_version: only FSDP2 is known here; say `fsdp_version: 2` in accelerate's configuration")
    if Version(version("accelerate")) < Version("1.14"):  # older ones put a model that is spread already into DDP
        raise ValueError(f"FSDP2 needs accelerate 1.14 or newer, this is {version('accelerate')}")
    if _asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "say `fsdp_cpu_ram_efficient_loading: false`: with true only the first process would read the weights"
        )
    if _asked("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError("fsdp_activation_checkpointing: it would draw other dropout; use --checkpointing full")
    if _asked("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params: spread weights stay on the GPUs here; say `fsdp_offload_params: false`")
    if (name := optimizer_name(optim)) not in SPREAD_OPTIMIZERS:
        raise ValueError(f"optim={name!r} with FSDP2: expected one of {', '.join(SPREAD_OPTIMIZERS)}")


def optimizer_name(optim: OptimSettings) -> str:
    """The name that transformers knows the optimizer by."""
    if not optim.offload_optimizer or optim.optim.startswith("paged_"):
        return optim.optim
    if optim.optim not in PAGED:
        raise ValueError(f"offload_optimizer with optim={optim.optim!r}: expected one of {', '.join(PAGED)}")
    return PAGED[optim.optim]


def engine_arguments(engine: Engine) -> dict[str, Any]:
    """`TrainingArguments` of an engine that accelerate was not launched for."""
    if engine != "deepspeed" or _asked("ACCELERATE_USE_DEEPSPEED"):
        return {}
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "deepspeed": {
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": "auto"},
            **dict.fromkeys(automatic, "auto"),
        }
    }
