"""LoRA adapters (peft) inside an unmodified model: several by name, one active at a time, switched without a walk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import check_backend
from .sharded import whole_state, writes


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters. Defaults are the paper's: r 16, alpha 32, dropout 0.05, all linear layers, no bias."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"
    """"all-linear", a regular expression, or names of linear layers."""


class AdaptedModel(nn.Module):
    """Base of the packed models: owns `model`, a transformers module that adapters are injected into.

    Attributes:
        attention: name of the packed-attention backend, None to choose by the call. Settable at any time.
    """

    def __init__(self, model: Any, name: str | None, attention: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.attention = attention
        self.adapters: dict[str, LoraSettings] = {}
        self._tuned: list[Any] = []
        self._unmerged: list[tuple[Any, Tensor | None]] = []

    @property
    def attention(self) -> str | None:
        return self._attention

    @attention.setter
    def attention(self, name: str | None) -> None:
        self._attention = check_backend(name)

    @property
    def layers_root(self) -> nn.Module:
        """The module whose linear layers "all-linear" means."""
        return self.model

    @property
    def layers(self) -> Any:
        """Its layers, a ModuleList."""
        return self.layers_root.layers

    def _linear_names(self) -> list[str]:
        names = {name for name, module in self.layers_root.named_modules() if isinstance(module, nn.Linear)}
        names = {name.removesuffix(".base_layer") for name in names if ".lora_" not in name}
        return sorted({name.rsplit(".", 1)[-1] for name in names})

    def add_adapter(self, settings: LoraSettings, name: str = "student") -> None:
        """Inject LoRA layers called `name`; the base weights freeze and the new adapter becomes active and trainable.

        peft's initialisation makes a new adapter the identity.

        Raises:
            ValueError: `target_modules` names no layer of the model, or r is not positive.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = settings.target_modules
        resolved = self._linear_names() if targets == "all-linear" else targets
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=resolved if isinstance(resolved, str) else list(resolved),
            bias="none",
        )
        self.model.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            inject_adapter_in_model(config, self.model, adapter_name=name)
        self.adapters[name] = settings
        self._tuned = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self.train_adapter(name)

    def remove_adapter(self, name: str) -> None:
        """Take the adapter `name` out of the model; the one that was active stays active."""
        for layer in self._tuned:
            layer.delete_adapter(name)
        del self.adapters[name]

    def train_adapter(self, name: str) -> None:
        """Make the adapter `name` the active and only trainable one, its weights in float32."""
        if name not in self.adapters:
            raise ValueError(f"adapter={name!r}: the model has {', '.join(self.adapters) or 'no adapter'}")
        for parameter_name, parameter in self.model.named_parameters():
            if ".lora_" in parameter_name:
                mine = f".{name}." in parameter_name
                parameter.requires_grad_(mine)
                if mine:
                    parameter.data = parameter.data.float()
        self._activate(name)

    def _activate(self, name: str | None) -> None:
        # Set on the layers directly: peft's own switch walks every module and resets requires_grad.
        for layer in self._tuned:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Run the block with adapter `name` (None: the bare model), then restore the one that was on."""
        if name is not None and name not in self.adapters:
            raise ValueError(f"adapter={name!r}: the model has {', '.join(self.adapters) or 'no adapter'}")
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._tuned]
        self._activate(name)
        try:
            yield
        finally:
            for layer, (disabled, active) in zip(self._tuned, before):
                layer._disable_adapters, layer._active_adapter = disabled, active

    @torch.no_grad()
    def merge_adapter(self, *, keep: bool = True) -> None:
        """Add the active adapter into the base weights, in place, so that running it costs nothing.

        Args:
            keep: hold the base weights in host memory, for `unmerge_adapter` to put back bit for bit.
        """
        for layer in self._tuned:
            if layer.merged or layer._disable_adapters:
                continue
            weight = layer.get_base_layer().weight
            self._unmerged.append((layer, weight.detach().to("cpu", copy=True) if keep else None))
            layer.merge()

    @torch.no_grad()
    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`. Raises ValueError where it did not keep the base weights."""
        if any(weight is None for _, weight in self._unmerged):
            raise ValueError("the adapter was merged for good (keep=False): load the model again")
        for layer, weight in self._unmerged:
            layer.get_base_layer().weight.copy_(weight)
            layer.merged_adapters.clear()
        self._unmerged.clear()

    def bare_state(self) -> dict[str, Tensor]:
        """The bare model's weights (no adapters) under the names that transformers gives them, each whole.

        Raises:
            ValueError: an adapter is merged into the weights.
        """
        if self._unmerged:
            raise ValueError("the adapter is merged into the base weights: unmerge it before saving")
        state = whole_state(self.model)
        return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}

    def save(self, folder: Any) -> None:
        """Write `bare_state` as safetensors so that `from_pretrained` reads it back."""
        state = self.bare_state()
        if writes(self.model):
            self.model.save_pretrained(folder, state_dict=state)
