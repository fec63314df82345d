"""Packed attention by the FlashAttention packages: generations 2, 3 and 4, each with its own `flash_attn_varlen_func`.

    generation  module                 pip                     kernels for
    2           flash_attn             flash-attn              Ampere and newer (and AMD)
    3           flash_attn_interface   flash-attention/hopper  Hopper
    4           flash_attn.cute        flash-attn-4            Hopper, Blackwell

Facts: the packages' interface files and READMEs. Their windows are (left, right): row i sees i - left to i + right,
both included; no limit is -1, in generation 4 None. Generation 4 is a beta whose limits move: what some release of it
refuses is refused here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .contract import AttentionPlan, Backend, Call, DistanceBias, cuda_missing, half_cannot, load


class _FlashPackage(Backend):
    module: str
    pip: str
    least: tuple[int, int]
    most: tuple[int, int] | None = None
    amd = False
    no_limit: int | None = -1

    def missing(self, device: torch.device) -> str | None:
        return cuda_missing(device, self.least, self.most, amd=self.amd) or self._function()[1]

    def _function(self) -> tuple[Callable[..., Tensor | tuple[Tensor, ...]] | None, str | None]:
        return load(self.module, "flash_attn_varlen_func", self.pip)

    def options(self, call: Call) -> dict[str, object]:
        """Keyword arguments beyond those that all generations share."""
        return {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, call: Call, bias: DistanceBias | None = None
    ) -> Tensor:
        function, reason = self._function()
        assert function is not None, reason
        left, right = (self.no_limit if side is None else side for side in call.sides)
        longest = plan.batch.max_seqlen
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=plan.cu_seqlens,
            cu_seqlens_k=plan.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size=(left, right),
            softcap=call.softcap or 0.0,
            **self.options(call),
        )
        return out[0] if isinstance(out, tuple) else out  # some releases add the log-sum-exp


class FlashAttention2(_FlashPackage):
    name = "flash_attn_2"
    about = "the flash-attn package; float16 and bfloat16 on CUDA, soft-cap and dropout"
    module, pip = "flash_attn", "pip install flash-attn --no-build-isolation, the extra `flash`"
    least, amd = (8, 0), True

    def cannot(self, call: Call) -> str | None:
        if call.softcap is not None and call.dropout:
            return "has no dropout together with a soft-cap"
        return half_cannot(call, 256)

    def options(self, call: Call) -> dict[str, object]:
        return {"dropout_p": call.dropout}


class FlashAttention3(_FlashPackage):
    name = "flash_attn_3"
    about = "FlashAttention-3 (flash_attn_interface); float16 and bfloat16 on Hopper, soft-cap"
    module, pip = "flash_attn_interface", "built from flash-attention's folder hopper/"
    least, most = (9, 0), (10, 0)

    def cannot(self, call: Call) -> str | None:
        if call.dropout:
            return "has no dropout"
        if call.head_dim % 8:
            return f"takes head sizes that are multiples of 8, not {call.head_dim}"
        return half_cannot(call, 256)


class FlashAttention4(_FlashPackage):
    name = "flash_attn_4"
    about = "FlashAttention-4 (flash_attn.cute); float16 and bfloat16 on Hopper and Blackwell"
    module, pip = "flash_attn.cute", "pip install flash-attn-4"
    least, most = (9, 0), (12, 0)
    no_limit = None

    def cannot(self, call: Call) -> str | None:
        if call.dropout:
            return "has no dropout"
        if call.head_dim not in (64, 96, 128):
            return f"is documented for head sizes 64, 96 and 128, not {call.head_dim}"
        if call.softcap is not None and call.needs_grad:
            return "has no backward pass with a soft-cap"
        if call.window is not None and call.needs_grad:
            return "is not documented to have a backward pass with a window"
        return half_cannot(call, 128)
