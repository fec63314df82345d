"""The switches of `OptimSettings` that make a step smaller or faster, each through the library that has it."""

from __future__ import annotations

import logging
import shutil
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..models import MTLLM, LoraSettings, PackedEncoder, PackedLLM
from ..models.adapters import check_settings
from ..models.checkpointing import kept_bytes_per_token, layers_within, recompute_layers
from ..models.compile import compile_layers
from ..models.encoder import check_encoder
from ..models.encoders import family_of
from ..models.frozen import KINDS, PACKAGES, Fp8Linear, check_fp8_width, frozen_linears, quantize_frozen
from ..models.llm import empty_llm
from .automatic import on_gpu, settled
from .config import OptimSettings
from .engines import choose_engine, optimizer_name

log = logging.getLogger(__name__)


def _needs(package: str, extra: str, what: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{what} needs {package}: pip install 'mtllm-fast[{extra}]'")


def check_switches(optim: OptimSettings, *, include_base: bool = False) -> None:
    """Refuse, before a model is loaded, what this machine or the other settings cannot serve.

    Raises:
        ValueError: naming the setting, and the extra of a package that is missing.
    """
    from transformers.training_args import OptimizerNames

    if optim.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': no CUDA device is visible; see `mtllm doctor`")
    choose_engine(optim)
    kind, gpu = optim.base_weights, on_gpu(optim)
    name = optimizer_name(optim)
    if name not in {str(known.value) for known in OptimizerNames}:
        raise ValueError(f"optim={optim.optim!r}: expected a name that transformers knows, such as adamw_8bit")
    if kind in PACKAGES:
        _needs(PACKAGES[kind], "quant", f"base_weights={kind!r}")
    if kind in KINDS and include_base:
        raise ValueError(f"include_base with base_weights={kind!r}: the base weights would be saved quantised")
    if kind == "fp8":
        if not gpu or torch.version.hip:  # on a CPU it would only be slower; AMD's fp8 is another format
            raise ValueError(
                "base_weights='fp8': needs a GPU of NVIDIA's, of compute capability 8.9 or newer; int8 and nf4 do not"
            )
        if torch.cuda.get_device_capability() < (8, 9):
            raise ValueError(
                f"base_weights='fp8': needs compute capability 8.9, {torch.cuda.get_device_name()} has less"
            )
    if name in ("adamw_torch_8bit", "adamw_torch_4bit"):
        _needs("torchao", "quant", f"optim={name!r}")
    elif name.startswith("paged_") or name.endswith(("_8bit", "bnb")):
        which = "offload_optimizer" if optim.offload_optimizer else f"optim={name!r}"
        if name.startswith("paged_") and not gpu:
            raise ValueError(f"{which}: on the CPU the optimizer's state is in host memory already")
        _needs("bitsandbytes", "quant", which)
    if optim.liger:
        _needs("liger_kernel", "liger", "liger")
        if not gpu:
            raise ValueError("liger: its layers are Triton kernels and need a GPU")
    if optim.compile and not gpu and not (shutil.which("g++") or shutil.which("c++")):
        raise ValueError("compile: torch.compile needs a C++ compiler (g++) on the CPU")


def base_dtype(optim: OptimSettings, *, include_base: bool = False) -> torch.dtype:
    """The dtype in which base models are loaded, after `check_switches`."""
    check_switches(optim, include_base=include_base)
    if optim.base_weights == "auto":
        return torch.bfloat16 if optim.bf16 and on_gpu(optim) else torch.float32
    if optim.base_weights in ("fp32", "bf16"):
        return torch.float32 if optim.base_weights == "fp32" else torch.bfloat16
    return torch.bfloat16 if optim.bf16 else torch.float32


def check_layers(
    optim: OptimSettings, role: str, name: str, lora: LoraSettings | None, trust_remote_code: bool = False
) -> None:
    """Refuse, before weights are read, adapters or base weights that the linear layers of a base model cannot have.

    Args:
        role: "llm" or "encoder", whichever carries the adapters; `name` is its folder or hub name.
        lora: of new adapters; None for those that a model has already.

    Raises:
        ValueError: a setting of `lora` is out of range, its targets match no linear layer, `base_weights` cannot hold
            one, or `name` is no model.
    """
    if lora is None and optim.base_weights != "fp8":
        return
    model: PackedLLM | PackedEncoder
    if role == "llm":
        model = PackedLLM(empty_llm(name, trust_remote_code))
    else:
        model = _empty_encoder(name, trust_remote_code)
    if lora is not None:
        check_settings(lora)
        model.check_targets(lora.target_modules)
    if optim.base_weights == "fp8":
        for path, _, _, layer in frozen_linears(model.requires_grad_(False).layers_root):
            check_fp8_width(path, layer)


def check_encoder_lora(name: str, lora: LoraSettings, trust_remote_code: bool = False) -> None:
    """As `check_layers`, for a LoRA in the encoder of a stack.

    Raises:
        ValueError: a setting of `lora` is out of range, its targets match no linear layer, or `name` is no encoder.
    """
    check_settings(lora)
    encoder = _empty_encoder(name, trust_remote_code)
    try:
        encoder.check_targets(lora.target_modules)
    except ValueError as error:
        raise ValueError(f"train_encoder='lora': encoder={name!r}: {error}") from None


def _empty_encoder(name: str, trust_remote_code: bool) -> PackedEncoder:
    """The encoder of `name` without its weights."""
    config = check_encoder(name, trust_remote_code)
    with torch.device("meta"):
        return PackedEncoder(family_of(config, name).build(config))


def apply_switches(
    student: MTLLM, optim: OptimSettings, device: torch.device, wrapped: nn.Module | None = None
) -> None:
    """Put the switches of `optim` into the student, in place; the trainer has not wrapped it yet.

    Args:
        wrapped: the module with the student in it that DistributedDataParallel may get.

    Raises:
        ValueError: a switch that this student cannot have, or an activation budget that is too small.
    """
    backbone, optim = student.backbone, settled(optim)
    if optim.base_weights in KINDS:
        count = quantize_frozen(backbone.layers_root, optim.base_weights, device)
        log.info("base weights: %d linear layers in %s", count, optim.base_weights)
        if wrapped is not None:
            # it would send them to the other processes, which torchao's tensors do not allow, and buffers at every
            # step; all have read the same
            frozen = [name for name, p in wrapped.named_parameters() if is_traceable_wrapper_subclass(p)]
            for path, layer in wrapped.named_modules():
                if isinstance(layer, Fp8Linear):
                    frozen += [f"{path}.{name}" for name, _ in layer.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, frozen)
    if optim.liger:
        apply_liger(student)
    if optim.checkpointing == "full":
        student.gradient_checkpointing_enable()
    elif optim.checkpointing == "budget":
        # else it is measured where it was loaded: a model that FSDP will spread may be too large for one device
        if optim.liger or optim.base_weights in KINDS:
            student.to(device)
        where = next(backbone.parameters()).device.type
        with torch.autocast(where, torch.bfloat16, enabled=bool(optim.bf16)):
            kept, recomputed = kept_bytes_per_token(backbone)
        layers = len(backbone.layers)
        count = layers_within(optim.activation_memory_gib * 2**30, optim.tokens, layers, kept, recomputed)
        recompute_layers(backbone, count)
        message = "checkpointing: %d of %d layers run again in backward (%.1f KiB per token and layer)"
        log.info(message, count, layers, kept / 1024)
    if optim.compile:
        for part in (student.encoder, student.llm):
            if part is not None:
                compile_layers(part.layers)


def apply_liger(student: MTLLM) -> None:
    """Liger's RMSNorm, RoPE and SwiGLU in the LLM; RoPE for every model of its family in this process.

    Raises:
        ValueError: the student has no LLM, or one of a family that Liger does not know.
    """
    from transformers.integrations.liger import apply_liger_kernel

    if student.llm is None:
        raise ValueError("liger: reader='encoder' has no LLM for its layers")
    family = student.llm.model.config.model_type
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"liger: has no layers for {family!r}; it knows {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}"
        )
    model: nn.Module = student.llm.model
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
