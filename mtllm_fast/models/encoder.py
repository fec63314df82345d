"""MT encoders on packed rows.

A family is one function `(encoder, batch, plan) -> (T, E)`, the states before the final norm, with the name of that
norm, and one line in `FAMILIES`. Positions restart at every sequence, with the family's own offset, so that a packed
batch gives the rows that Hugging Face gives on a padded one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.pack import PackedBatch
from .adapters import AdaptedModel
from .attention import NAME, AttentionPlan
from .loading import load_pretrained


def packed_m2m100(encoder: Any, batch: PackedBatch, plan: AttentionPlan) -> Tensor:
    """M2M100 and NLLB: sinusoidal position p sits at table row `p + padding_idx + 1`."""
    table, offset = encoder.embed_positions, encoder.padding_idx + 1
    if batch.max_seqlen + offset > table.weights.shape[0]:
        table.make_weights(batch.max_seqlen + offset, table.embedding_dim, table.padding_idx)
    hidden = encoder.embed_tokens(batch.input_ids)
    hidden = hidden + table.weights.index_select(0, batch.positions + offset).to(hidden.dtype)
    hidden = F.dropout(hidden, encoder.dropout, encoder.training)[None]
    for layer in encoder.layers:
        hidden = layer(hidden, None, plan=plan)
    return hidden[0]


FAMILIES: dict[str, tuple[Callable[[Any, PackedBatch, AttentionPlan], Tensor], str]] = {
    "m2m_100": (packed_m2m100, "layer_norm"),  # NLLB-200 and M2M-100
}


class PackedEncoder(AdaptedModel):
    """A Hugging Face encoder that reads packed batches.

    Args:
        encoder: the encoder module, e.g. `M2M100Model(...).encoder`.
        name: the folder or hub name it came from, kept for saving; None for a model made in memory.
        attention: packed-attention backend (`mtllm doctor` lists them), None to choose by the call.
    """

    def __init__(self, encoder: Any, name: str | None = None, *, attention: str | None = None) -> None:
        super().__init__(encoder, name, attention)
        family = encoder.config.model_type
        if family not in FAMILIES:
            raise ValueError(f"encoder: model type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        if encoder.config.encoder_layerdrop:
            encoder.config.encoder_layerdrop = (
                0.0  # layers are not dropped here: the encoder is distilled, not pre-trained
            )
        encoder.set_attn_implementation(NAME)
        self._run, self._norm = FAMILIES[family]

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: torch.dtype | None = None,
        *,
        trust_remote_code: bool = False,
        attention: str | None = None,
    ) -> PackedEncoder:
        """Load from a folder or the hub; an encoder-decoder model gives up its decoder.

        Raises:
            ValueError: `name` is not a model, or its family is not supported.
        """
        model = load_pretrained("encoder", name, dtype, trust_remote_code)
        encoder = model.get_encoder() if hasattr(model, "decoder") or hasattr(model, "model") else model
        return cls(encoder, name, attention=attention)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.d_model)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def final_norm(self) -> nn.LayerNorm:
        """The norm that ends the encoder."""
        return getattr(self.model, self._norm)

    @property
    def layers(self) -> Any:
        return self.model.layers

    def all_states(self, batch: PackedBatch) -> Tensor:
        """States (L, T, E) of the packed MT tokens as they come from each layer, before the final norm."""
        found: list[Tensor] = []

        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0])

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            self(batch, final_norm=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(found)

    def forward(self, batch: PackedBatch, plan: AttentionPlan | None = None, *, final_norm: bool = True) -> Tensor:
        """Last hidden states (T, E) of the packed MT tokens; without `final_norm` as they come from the last layer."""
        states = self._run(self.model, batch, plan or AttentionPlan(batch, False, self.attention))
        return self.final_norm(states) if final_norm else states
