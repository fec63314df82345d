"""MT encoders on packed rows.

Positions restart at every sequence, with the family's own offset, so that a packed batch gives the rows that Hugging
Face gives on a padded one. What differs from family to family is in `encoders/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.pack import PackedBatch
from ..data.tokenise import StackTokenizer
from .adapters import AdaptedModel
from .attention import NAME, AttentionPlan
from .config import MTLLMConfig
from .encoders import family_of
from .fusion import FusionSettings
from .loading import base_tokenizer, load_config, load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def check_encoder(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of the encoder in a folder or on the hub, before anything else of it is read.

    Raises:
        ValueError: `name` is no model, or its family is not supported (with those that are).
    """
    config = load_config("encoder", name, trust_remote_code)
    family_of(config, name)
    return config


def fit_tokenizer(tokenizer: StackTokenizer, config: PreTrainedConfig, name: str) -> None:
    """Check that the MT side of `tokenizer` is the one of the encoder `name`, and tell it how many positions there are.

    Raises:
        ValueError: it has token ids that the encoder lacks, no language codes for an encoder that needs them, or writes
            them where they would not be read.
    """
    if tokenizer.mt is None:
        return
    family = family_of(config, name)
    if (count := len(tokenizer.mt)) > family.vocab_size(config):
        raise ValueError(
            f"tokenizer: has {count} MT tokens, but encoder {name!r} has embeddings for {family.vocab_size(config)}: "
            "it belongs to another encoder"
        )
    family.check_tokenizer(tokenizer, name)
    tokenizer.mt_positions = family.max_positions(config)


class PackedEncoder(AdaptedModel):
    """A Hugging Face encoder that reads packed batches.

    Args:
        encoder: the encoder module, e.g. `M2M100Model(...).encoder` or `BertModel(...)`.
        name: the folder or hub name it came from, kept for saving; None for a model made in memory.
        attention: packed-attention backend (`mtllm doctor` lists them), None to choose by the call.

    Attributes:
        family: what `models.encoders` knows of its kind.
    """

    def __init__(self, encoder: PreTrainedModel, name: str | None = None, *, attention: str | None = None) -> None:
        family = family_of(encoder.config)
        super().__init__(family.encoder_of(encoder), name, attention)
        self.family = family
        family.prepare(self.model)
        self.model.set_attn_implementation(NAME)

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
        return cls(load_pretrained("encoder", name, dtype, trust_remote_code), name, attention=attention)

    def take_tokenizer(self, tokenizer: StackTokenizer) -> None:
        """See `fit_tokenizer`."""
        fit_tokenizer(tokenizer, self.model.config, self.name or type(self.model).__name__)

    @property
    def hidden_size(self) -> int:
        return self.family.width(self.model.config)

    @property
    def num_layers(self) -> int:
        return self.family.num_layers(self.model.config)

    @property
    def vocab_size(self) -> int:
        return self.family.vocab_size(self.model.config)

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text that it can read, None where there is no limit."""
        return self.family.max_positions(self.model.config)

    @property
    def layers_root(self) -> nn.Module:
        return self.family.layers_root(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        return self.family.layers(self.model)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm that ends the encoder, None where the last layer ends in its own."""
        return self.family.final_norm(self.model)

    def all_states(self, batch: PackedBatch) -> Tensor:
        """States (L, T, E) of the packed MT tokens as they come from each layer, before the final norm."""
        return torch.stack(self.layer_states(batch)[1:])

    def layer_states(self, batch: PackedBatch) -> list[Tensor]:
        """L + 1 states (T, E) of the packed MT tokens: what the first layer reads, and what comes from each layer,
        before the final norm."""
        found: list[Tensor] = []

        def first(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0][0])

        def keep(layer: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0])

        handles = [self.layers[0].register_forward_pre_hook(first)]
        handles += [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            self(batch, final_norm=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def forward(
        self,
        batch: PackedBatch,
        plan: AttentionPlan | None = None,
        *,
        final_norm: bool = True,
        fusion: FusionSettings | None = None,
    ) -> Tensor:
        """Last hidden states (T, E) of the packed MT tokens; without `final_norm` as they come from the last layer.

        Args:
            fusion: layers that read texts and their partners end to end, as `check_fusion` found that they can.

        Raises:
            ValueError: a text has more tokens than the encoder has positions.
        """
        limit = self.max_positions
        if limit is not None and batch.max_seqlen > limit:
            raise ValueError(f"batch: a text of {batch.max_seqlen} tokens; the encoder has positions for {limit}")
        states = self.family.run(self.model, batch, plan or self._plan(batch, fusion))
        norm = self.final_norm if final_norm else None
        return states if norm is None else norm(states)

    def _plan(self, batch: PackedBatch, fusion: FusionSettings | None) -> AttentionPlan:
        elsewhere: dict[nn.Module, AttentionPlan] = {}
        if fusion is not None and batch.partners:
            # by module, not by hooks on the layers: those run neither in a compiled layer nor when one is run again
            pairs = AttentionPlan(batch.pairs, False, self.attention)
            elsewhere = {module: pairs for layer in fusion.numbers for module in self.layers[layer].modules()}
        return AttentionPlan(batch, False, self.attention, elsewhere=elsewhere)


def describe_encoder(name: str) -> list[str]:
    """What is known of the encoder in a folder or on the hub without reading its weights, in a few lines.

    Raises:
        ValueError: as `check_encoder`.
    """
    config = check_encoder(name)
    family = family_of(config)
    limit = family.max_positions(config)
    lines = [
        f"{name}: family {config.model_type} ({family.about})",
        f"states: {family.num_layers(config)} layers of width {family.width(config)}; "
        + ("texts of any length" if limit is None else f"texts of at most {limit} tokens"),
    ]
    try:
        tokenizer = base_tokenizer(MTLLMConfig(reader="encoder", encoder=name))
        fit_tokenizer(tokenizer, config, name)
    except ValueError as error:
        return [*lines, f"tokenizer: {str(error).removeprefix('tokenizer: ')}"]
    codes = tokenizer.languages
    if codes:
        return [*lines, f"languages: {len(codes)} codes ({', '.join(codes[:3])}, ...); every text names its own"]
    return [*lines, "languages: takes no codes; one that is named is ignored"]
