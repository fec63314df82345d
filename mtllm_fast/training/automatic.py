"""Settings that nobody gave, chosen by the device when a run starts; a run that is resumed keeps those it has.

On the CPU: fp32, 4,096 tokens, no workers, plain layers. On a GPU: bf16 where it multiplies it; as many tokens as fill
it (8,192 at the width of an 8B model), fewer where they would not fit; a worker per two cores that a process has, four
at most; Liger's layers where they are installed and know the LLM's family, else torch.compile where it can work.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..kernels.gemms import has_fast_bf16
from .config import OptimSettings
from .engines import choose_engine
from .processes import is_first, processes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

ON_CPU: dict[str, bool | int] = {"bf16": False, "tokens": 4096, "workers": 0, "compile": False, "liger": False}
FILLS_A_GPU = 8192  # tokens of a pack above which larger products are no faster
USED = 0.75  # share of a GPU's memory that weights and activations are planned to take
WORKERS = 4


@dataclass
class Settled(OptimSettings):
    """Settings with nothing left to choose."""

    bf16: bool = False
    tokens: int = 4096
    workers: int = 0
    compile: bool = False
    liger: bool = False


def on_gpu(optim: OptimSettings) -> bool:
    """Whether the run that `optim` describes trains on a GPU."""
    return optim.device != "cpu" and torch.cuda.is_available()


def to_device(model: nn.Module, optim: OptimSettings) -> None:
    """Move a model to the device that this process trains on, before there is a Trainer that does it."""
    if on_gpu(optim):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        model.to("cuda")


def settled(
    optim: OptimSettings, output: str = "", resume: bool = False, llm: str = "", trust_remote_code: bool = False
) -> Settled:
    """`optim` with a value for each setting that is None; says on a GPU which ones it chose, and where bf16 is slow.

    Args:
        output, resume: the run's folder, and whether what it records is to be kept.
        llm: folder or hub name of the LLM, "" without one.
    """
    if isinstance(optim, Settled):
        return optim
    given = {field.name: getattr(optim, field.name) for field in fields(OptimSettings)}
    open_settings = [name for name in ON_CPU if given[name] is None]
    if open_settings:
        chosen = _on_this_gpu(optim, llm, trust_remote_code) if on_gpu(optim) else dict(ON_CPU)
        kept = {name: value for name, value in _recorded(output, resume).items() if _can(name, value, optim)}
        given |= {name: kept.get(name, chosen[name]) for name in open_settings}
        given["tokens"] = max(given["tokens"], optim.max_length) if "tokens" in open_settings else given["tokens"]
        if on_gpu(optim) and is_first():
            # a warning is seen without any logging set up
            log.warning("auto: %s (%s)", _said(given, open_settings), torch.cuda.get_device_name())
    if given["bf16"] and not on_gpu(optim) and not has_fast_bf16() and is_first():
        log.warning("bf16: this processor has no bf16 instructions and multiplies it slower than fp32, the default")
    return Settled(**given)


def _recorded(output: str, resume: bool) -> dict[str, bool | int]:
    """The settings of the run in `output` that are still to be chosen in this call; {} for a new run."""
    from .run_folder import RUN_FILE

    try:
        train = json.loads((Path(output) / RUN_FILE).read_text(encoding="utf-8"))["train"] if resume else {}
        found = {name: train.get(name) for name in ("bf16", "tokens", "compile", "liger")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the run's folder says what is wrong with it
        return {}
    return {name: value for name, value in found.items() if value is not None}


def _can(name: str, value: bool | int, optim: OptimSettings) -> bool:
    """Whether a run that goes on here can keep a setting of before. Layers only change the rounding."""
    gpu = on_gpu(optim)
    if name == "liger" and value:
        return gpu and find_spec("liger_kernel") is not None
    if name == "compile" and value:
        return _can_compile() if gpu else bool(shutil.which("g++") or shutil.which("c++"))
    return True


def _on_this_gpu(optim: OptimSettings, llm: str, trust_remote_code: bool) -> dict[str, bool | int]:
    config = _config(llm, trust_remote_code)
    compiled, liger = _layers(optim, config)
    return {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "tokens": _tokens(optim, config),
        "workers": min(WORKERS, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // 2),
        "compile": compiled,
        "liger": liger,
    }


def _config(llm: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    """The config of the LLM; None without one, and where it cannot be read, which is said where the LLM is loaded."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(llm, trust_remote_code=trust_remote_code) if llm else None
    except (OSError, ValueError):
        return None


def _layers(optim: OptimSettings, config: PreTrainedConfig | None) -> tuple[bool, bool]:
    """(compile, liger). One that is asked for leaves the other off; spread weights are left to plain layers."""
    if optim.compile or optim.liger:
        return False, False
    if optim.liger is None and find_spec("liger_kernel") is not None and _liger_knows(config):
        return False, True
    return _can_compile() and choose_engine(optim) in ("one", "ddp"), False


def _liger_knows(config: PreTrainedConfig | None) -> bool:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return getattr(config, "model_type", None) in MODEL_TYPE_TO_APPLY_LIGER_FN


def _can_compile() -> bool:
    """Inductor needs Triton for the GPU, and Triton a C compiler for what launches its kernels."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return find_spec("triton") is not None and bool(compiler) and torch.cuda.get_device_capability() >= (7, 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokens(optim: OptimSettings, config: PreTrainedConfig | None) -> int:
    """Token budget of a pack: by the memory of the smallest GPU that is seen, so that all processes choose the same."""
    if config is None:
        return FILLS_A_GPU
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    weights, per_token = needed(config, recomputed=optim.checkpointing != "none")
    room = int((USED * memory - weights) / per_token)
    return min(FILLS_A_GPU, max(1024, room // 1024 * 1024))


def needed(config: PreTrainedConfig, recomputed: bool = False) -> tuple[float, float]:
    """(bytes of an LLM's weights in bf16, bytes that a step holds per token), both rounded up.

    A layer keeps about 12 rows of its width and 4.5 of its MLP's for backward, LoRA's dropout included, without fused
    layers (counted for Llama by `planning.simulate`); one whose layers are run again keeps one row of its width.
    """
    config = config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    mlp = getattr(config, "intermediate_size", None) or 4 * width
    weights = 2 * (layers * (4 * width * width + 3 * width * mlp) + 2 * config.vocab_size * width)
    layer = 2 * (12 * width + 4.5 * mlp)
    kept = layers * 2 * width + layer if recomputed else layers * layer
    return float(weights), float(kept + 6 * mlp)


def _said(given: Mapping[str, object], names: list[str]) -> str:
    layers = "Liger's layers" if given["liger"] else "compiled layers" if given["compile"] else "plain layers"
    words = {
        "bf16": "bf16" if given["bf16"] else "fp32",
        "tokens": f"{given['tokens']} tokens a pack",
        "workers": f"{given['workers']} workers",
        "compile": layers,
        "liger": layers,
    }
    several = f", {processes()} processes" if processes() > 1 else ""
    return ", ".join(dict.fromkeys(words[name] for name in names)) + several
