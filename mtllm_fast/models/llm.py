"""Any Hugging Face decoder as the LLM of the stack, unmodified, on packed rows, causal or bidirectional, with LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.pack import PackedBatch
from .adapters import AdaptedModel
from .attention import NAME, AttentionPlan, Branches, run_packed
from .gate import require
from .loading import empty_llm, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LMHead(nn.Module):
    """A view of the LLM's output head: `logits = softcap(states @ weight.T + bias)`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
        super().__init__()
        self.weight, self.bias, self.softcap = weight, bias, softcap


def length_limit(decoder: nn.Module) -> tuple[int, str] | None:
    """The longest sequence whose rotations do not depend on the longest one of the call, and the kind of scaling.

    "dynamic" and "longrope" scaling choose one set of frequencies for all rows by the largest position of the call (and
    "dynamic" keeps it for later calls), so beyond this length a text would change the others of its pack.
    """
    limits: list[tuple[int, str]] = []
    config: Any
    for module in decoder.modules():
        kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        rope = getattr(config, "rope_parameters", None) or {}
        for layer, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
            parameters = (rope if layer is None else rope.get(layer)) or {}
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                limit = parameters.get("original_max_position_embeddings")
                if "dynamic" in kind or limit is None:
                    limit = getattr(module, "original_max_seq_len", None)
                    limit = limit or getattr(config, "max_position_embeddings", None)
                limits.append((int(limit), kind))  # type: ignore[arg-type]  # such positions always have a limit
    return min(limits, default=None)


def forget_lengths(decoder: nn.Module) -> None:
    """Take "dynamic" scaling back to where it begins: it keeps the frequencies of the longest text that it has met.

    transformers itself does so at the next text below the limit, but not at one of exactly the limit, nor at a longer
    one that is shorter than the one before.
    """
    module: Any
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
            if isinstance(kind, str) and "dynamic" in kind:
                prefix = "" if layer is None else f"{layer}_"
                own = getattr(module, f"{prefix}inv_freq")
                first = getattr(module, f"{prefix}original_inv_freq").to(own.device)
                module.register_buffer(f"{prefix}inv_freq", first.clone(), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


class PackedLLM(AdaptedModel):
    """A causal-LM model of transformers, called on packed batches.

    Args:
        model: e.g. `LlamaForCausalLM(config)`; its code and weights stay as they are.
        causal: False lets every row see its whole sequence (LLM2Vec style).
        name: the folder or hub name it came from, kept for saving; None for a model made in memory.
        attention: packed-attention backend (`mtllm doctor` lists them), None to choose by the call.

    Raises:
        ValueError: `model` is no causal LM, or its packed rows would not be its own (gate.py).
    """

    def __init__(
        self, model: PreTrainedModel, causal: bool = False, name: str | None = None, *, attention: str | None = None
    ) -> None:
        super().__init__(model, name, attention)
        if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
            raise ValueError(f"llm: {type(model).__name__} has no LM head; load it as a causal LM")
        self.causal = causal
        self.length_limit = length_limit(model.get_decoder())
        forget_lengths(model.get_decoder())
        model.set_attn_implementation(NAME)

    @property
    def causal(self) -> bool:
        return self._causal

    @causal.setter
    def causal(self, causal: bool) -> None:
        self._verdict = require(self.model, causal)
        self._causal = causal

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        causal: bool = False,
        dtype: torch.dtype | None = None,
        *,
        trust_remote_code: bool = False,
        attention: str | None = None,
    ) -> PackedLLM:
        """Load from a folder or the hub.

        Raises:
            ValueError: `name` is no causal LM, or one whose packed rows would not be its own (before its weights are
                read; gate.py).
        """
        require(empty_llm(name, trust_remote_code), causal)
        return cls(load_pretrained("llm", name, dtype, trust_remote_code), causal, name, attention=attention)

    @property
    def decoder(self) -> PreTrainedModel:
        return self.model.get_decoder()

    @property
    def layers_root(self) -> nn.Module:
        return self.decoder  # the LM head is not adapted

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def lm_head(self) -> LMHead:
        """Weight (V, D), bias (V,) or None and soft-cap of the LM head.

        Raises:
            ValueError: the model scales its logits in a way the loss does not know.
        """
        config = self.model.config.get_text_config()
        for field in ("logit_scale", "logits_scaling"):
            if getattr(config, field, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"llm: {config.model_type} scales its logits by {field}; the KL loss does not support that"
                )
        head = self.model.get_output_embeddings()
        return LMHead(head.weight, getattr(head, "bias", None), getattr(config, "final_logit_softcapping", None))

    @contextmanager
    def states_after(self, layer: int | None) -> Iterator[list[Tensor]]:
        """A list that gets the states (T, D) after layer `layer`, from 1, of every call in the block; None: it stays
        empty."""
        found: list[Tensor] = []
        if layer is None:
            yield found
            return

        def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0])

        handle = self.layers[layer - 1].register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    def embedding_std(self) -> float:
        """Standard deviation of the LLM's input embeddings, as its layers receive them (sampled on 4,096 tokens)."""
        table = self.model.get_input_embeddings()
        ids = torch.arange(min(self.vocab_size, 4096), device=table.weight.device)
        with torch.no_grad():
            return float(table(ids).float().std())

    def forward(self, batch: PackedBatch | Branches, embeds: Tensor | None = None) -> Tensor:
        """Last hidden states (T, D), after the final norm.

        Args:
            batch: packed tokens; their ids are read unless `embeds` is given. Of branches the T rows are read.
            embeds: (T, D) input embeddings in place of the ids' own.

        Raises:
            ValueError: a sequence beyond `length_limit`, or branches of a bidirectional LLM, whose rows would see what
                follows them.
        """
        branches = batch if isinstance(batch, Branches) else None
        batch = batch.whole if isinstance(batch, Branches) else batch
        if branches is not None and not self.causal:
            raise ValueError("batch: sequences share rows only where these do not see what follows; causal=True")
        if self.length_limit is not None and batch.max_seqlen > self.length_limit[0]:
            limit, kind = self.length_limit
            raise ValueError(
                f"llm: a text has {batch.max_seqlen} tokens; {kind!r} scaling of the positions changes every text of a "
                f"pack above {limit}; cut texts to {limit} tokens (max_mt_tokens, max_llm_tokens)"
            )
        plan = AttentionPlan(batch, self.causal, self.attention, self._verdict.exclusive, branches)
        return run_packed(self.decoder, plan, embeds)
