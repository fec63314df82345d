"""Hugging Face models on packed batches, unmodified.

Every model that calls its attention through `ALL_ATTENTION_FUNCTIONS` runs on a packed batch as it is: `NAME` is
registered once, the model is called with batch size 1 and the keyword `plan=AttentionPlan(...)`, which reaches
`packed_attention` through the layers' keyword arguments. No attention mask is ever built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .choice import attention
from .contract import AttentionPlan, DistanceBias

NAME = "mtllm_packed"


@torch.compiler.disable  # it depends on the lengths of the batch: every batch would be compiled anew
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,  # (1, H_kv, T, d_v)
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | DistanceBias | None = None,
    **_: object,
) -> tuple[Tensor, None]:  # (1, T, H, d_v)
    """The function behind the attention name "mtllm_packed".

    Raises:
        ValueError: the model was called without `plan`, needs attention sinks or a position bias that
            does not go by distance, or the plan's
            backend cannot serve the call.
    """
    if plan is None:
        raise ValueError(
            f"attention {NAME!r} needs plan=AttentionPlan(...): call the model through PackedLLM/PackedEncoder"
        )
    bias = position_bias if isinstance(position_bias, DistanceBias) else None
    for name, extra in (("attention sinks (s_aux)", s_aux), ("a position bias", None if bias else position_bias)):
        if extra is not None:
            raise ValueError(f"{type(module).__name__} has {name}, which packed attention does not know")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    own = plan.at(module)
    if own.branches is not None:
        q, k, v = (x.index_select(0, own.branches.rows) for x in (q, k, v))
    out = attention(q, k, v, own, scale=scaling, window=sliding_window, softcap=softcap, dropout=dropout, bias=bias)
    if own.branches is not None:
        out = out.index_select(0, own.branches.slots)
    return out[None], None


def run_packed(decoder: nn.Module, plan: AttentionPlan, embeds: Tensor | None = None) -> Tensor:
    """Last hidden states (T, D) of a transformers decoder on the plan's batch, or on that of its branches.

    Args:
        decoder: its attention is `NAME`.
        embeds: (T, D) input embeddings in place of the ids' own.
    """
    batch = plan.batch if plan.branches is None else plan.branches.batch
    inputs = {"input_ids": batch.input_ids[None]} if embeds is None else {"inputs_embeds": embeds[None]}
    output = decoder(
        **inputs,
        position_ids=batch.positions[None],
        # a mask that counts as prepared: transformers would otherwise look for packed sequences, and wait for the
        # device to answer; the plan says where sequences end
        attention_mask=batch.positions.new_empty(1, 1, 0, 0),
        use_cache=False,
        plan=plan,
    )
    return output.last_hidden_state[0]


def _no_mask(*args: object, **kwargs: object) -> None:
    return None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
