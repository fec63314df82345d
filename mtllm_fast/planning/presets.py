"""Published model configurations and device datasheets, so that a plan needs no download.

Configurations are the numbers of the models' own config.json; device figures are the vendors' dense bf16 rates and
memory bandwidths, with the shares of them that a large GEMM and a copy reach in practice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..training.live import BF16_FLOPS
from .accounting import Rates

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Numbers = dict[str, Any]  # of a config.json


def _nllb(d_model: int, layers: int, ffn: int) -> Numbers:
    return {
        "model_type": "m2m_100",
        "vocab_size": 256206,
        "d_model": d_model,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": ffn,
        "decoder_ffn_dim": ffn,
        "max_position_embeddings": 1024,
        "activation_function": "relu",
    }


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, **more: int | str) -> Numbers:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **more,
    }


MODELS: dict[str, Numbers] = {
    "nllb-200-distilled-600M": _nllb(1024, 12, 4096),
    "nllb-200-distilled-1.3B": _nllb(1024, 24, 8192),
    "nllb-200-3.3B": _nllb(2048, 24, 8192),
    "Meta-Llama-3-8B-Instruct": _llama(4096, 32, 32, 8, 14336, 128256),
    "Llama-3.2-1B": _llama(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True, head_dim=64),
    "Mistral-7B-v0.1": _llama(4096, 32, 32, 8, 14336, 32000, model_type="mistral", sliding_window=4096),
    "Qwen2.5-7B": _llama(3584, 28, 28, 4, 18944, 152064, model_type="qwen2"),
}
ALIASES = {
    "NLLB-600M": "nllb-200-distilled-600M",
    "NLLB-1.3B": "nllb-200-distilled-1.3B",
    "NLLB-3.3B": "nllb-200-3.3B",
    "Llama-3-8B": "Meta-Llama-3-8B-Instruct",
    "Meta-Llama-3-8B": "Meta-Llama-3-8B-Instruct",
    "Mistral-7B": "Mistral-7B-v0.1",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        flops: dense bf16 FLOP/s by the datasheet; bandwidth: bytes/s; memory: bytes.
        gemm, copy: shares of the two that are reached. The H100's are measured ceilings of large bf16 GEMMs and of a
            copy (795 TFLOP/s, 3.0 TB/s); the others take the same shares.
        architecture: key of the kernels' tile tables.
    """

    flops: float
    bandwidth: float
    memory: float
    architecture: str
    gemm: float = 0.80
    copy: float = 0.90

    @property
    def rates(self) -> Rates:
        return Rates(self.flops * self.gemm, self.bandwidth * self.copy)


GPUS: dict[str, Gpu] = {
    "A100-80GB": Gpu(BF16_FLOPS["A100"], 2.039e12, 80e9, "sm_80"),
    "A100-40GB": Gpu(BF16_FLOPS["A100"], 1.555e12, 40e9, "sm_80"),
    "H100": Gpu(BF16_FLOPS["H100"], 3.35e12, 80e9, "sm_90"),
    "H200": Gpu(BF16_FLOPS["H200"], 4.8e12, 141e9, "sm_90"),
    "B200": Gpu(BF16_FLOPS["B200"], 7.7e12, 180e9, "sm_100"),
}


def config(name: str, role: str = "name") -> PreTrainedConfig:
    """The transformers config of `name`: a preset, a folder, or a hub name.

    Args:
        role: the argument that `name` is of, for the error.

    Raises:
        ValueError: it is neither of the three.
    """
    from transformers import AutoConfig

    from ..models.names import check_folder

    key = ALIASES.get(name.rsplit("/", 1)[-1], name.rsplit("/", 1)[-1])
    if key in MODELS:
        settings = dict(MODELS[key])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    check_folder(role, name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{role}={name!r}: no preset ({', '.join(MODELS)}), no folder with a config.json, and not to be had from "
            f"the hub: {' '.join(str(error).split())[:120]}"
        ) from None


def gpu(name: str) -> Gpu:
    """The GPU called `name`. Raises ValueError naming the known ones."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name!r}: expected one of {', '.join(GPUS)}, or auto")
    return GPUS[name]


def this_gpu() -> str:
    """The name in `GPUS` of this machine's first GPU; an H200 where there is none, or one that is not known."""
    import torch

    if torch.cuda.is_available():
        words = torch.cuda.get_device_name(0).replace("-", " ").split()  # "NVIDIA A100-SXM4-80GB"
        memory = torch.cuda.get_device_properties(0).total_memory
        alike = [name for name in GPUS if name.split("-")[0] in words]
        if alike:
            return min(alike, key=lambda name: abs(GPUS[name].memory - memory))
    return "H200"
