"""Attention over packed sequences: one contract, several backends, and unmodified Hugging Face models on top.

contract.py      what a call asks, what a backend answers, the plan that layers share, the reference
sdpa.py          buckets through scaled_dot_product_attention: any device and dtype
varlen.py        FlashAttention-2 inside torch
flash.py         the FlashAttention packages: generations 2, 3 and 4
xformers.py      memory_efficient_attention with block-diagonal masks
flex.py          FlexAttention with a document mask
choice.py        the registry, and which backend serves a call
transformers.py  the attention name "mtllm_packed" of Hugging Face models
"""

from .choice import BACKENDS, attention, check_backend, choose_backend
from .contract import AttentionPlan, Backend, Branches, Call, DistanceBias, reference
from .transformers import NAME, packed_attention, run_packed

__all__ = [
    "BACKENDS",
    "NAME",
    "AttentionPlan",
    "Backend",
    "Branches",
    "Call",
    "DistanceBias",
    "attention",
    "check_backend",
    "choose_backend",
    "packed_attention",
    "reference",
    "run_packed",
]
