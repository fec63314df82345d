"""LoRA adapters (peft) inside an unmodified model: several by name, one active at a time, switched without a walk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import check_backend
from .sharded import whole_state, writes


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters. Defaults are the paper's: r 16, alpha 32, dropout 0.05, all linear layers, no bias."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: float = 0.05
    """Of the adapter's input, while training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """"all-linear", a regular expression, or names of linear layers."""


def check_settings(settings: LoraSettings) -> None:
    """Raise ValueError where a setting is out of range."""
    if settings.r < 1:
        raise ValueError(f"lora.r={settings.r}: must be >= 1")
    if not settings.alpha > 0:
        raise ValueError(f"lora.alpha={settings.alpha}: must be > 0")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"lora.dropout={settings.dropout}: must be in [0, 1)")


# what peft can do to a model beyond plain LoRA, as it is saved here
_MORE_THAN_LORA = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
    "exclude_modules", "target_parameters", "trainable_token_indices", "lora_bias",
)  # fmt: skip


def _settings_of(name: str, config: Any) -> LoraSettings:
    """What a peft config says of the adapter `name`. Raises ValueError where that is more than plain LoRA."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    more = [f"{option}={value!r}" for option in _MORE_THAN_LORA if (value := getattr(config, option, None))]
    if kind == "LORA" and config.bias != "none":
        more.append(f"bias={config.bias!r}")
    if kind == "LORA" and config.init_lora_weights not in (True, False, "gaussian"):
        more.append(f"init_lora_weights={config.init_lora_weights!r}")
    if kind != "LORA" or more:
        raise ValueError(
            f"adapter={name!r}: peft put {' with '.join([kind, ', '.join(more)] if more else [kind])} into the model; "
            "only plain LoRA is saved here and switched off in the teacher"
        )
    targets = config.target_modules
    return LoraSettings(
        config.r,
        config.lora_alpha,
        config.lora_dropout,
        targets if isinstance(targets, str) else tuple(sorted(targets)),
    )


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
        self._merged: str | None = None

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
    def layers(self) -> nn.ModuleList:
        """Its layers."""
        root: Any = self.layers_root
        return root.layers

    def _linear_names(self) -> list[str]:
        names = {name for name, module in self.layers_root.named_modules() if isinstance(module, nn.Linear)}
        names = {name.removesuffix(".base_layer") for name in names if ".lora_" not in name}
        return sorted({name.rsplit(".", 1)[-1] for name in names})

    def add_adapter(self, settings: LoraSettings, name: str = "student") -> None:
        """Inject LoRA layers called `name`; the base weights freeze and the new adapter becomes active and trainable.

        peft's initialisation makes a new adapter the identity.

        Raises:
            ValueError: `target_modules` names no linear layer of the model, a setting is out of range, or an adapter is
                merged into the weights.
        """
        check_settings(settings)
        self._check_unmerged(f"adding the adapter {name!r}")
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        from .lora import fuse_lora

        targets = settings.target_modules
        resolved = self._linear_names() if targets == "all-linear" else targets
        self.check_targets(targets)
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
        fuse_lora(self._tuned)
        self.train_adapter(name)

    def check_targets(self, targets: str | Sequence[str]) -> None:
        """Raise ValueError where `targets` ("all-linear", a regular expression, or names) miss every linear layer, or
        one does."""
        linear = [n.removesuffix(".base_layer") for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        linear = [n for n in linear if ".lora_" not in n]
        known = ", ".join(self._linear_names())
        if targets == "all-linear":
            targets = self._linear_names()
        if isinstance(targets, str):
            try:
                hits = [n for n in linear if re.fullmatch(targets, n)]
            except re.error as error:
                raise ValueError(f"lora.target_modules={targets!r}: no regular expression ({error})") from None
            if not hits:
                raise ValueError(f"lora.target_modules={targets!r}: matches no linear layer; there are {known}")
            return
        missing = [t for t in targets if not any(n == t or n.endswith("." + t) for n in linear)]
        if missing or not targets:
            raise ValueError(f"lora.target_modules={list(targets)}: no linear layer {missing}; there are {known}")

    def adopt_adapters(self) -> dict[str, LoraSettings]:
        """Make the adapters that `peft.get_peft_model(this.model, ...)` put into the model this object's own, so that
        they are saved, merged, and off in the teacher; returns them by name.

        Raises:
            ValueError: an adapter that is more than plain LoRA, which could not be saved.
        """
        given = {**getattr(self.model, "peft_config", {}), **getattr(self, "peft_config", {})}
        new = {name: _settings_of(name, config) for name, config in given.items() if name not in self.adapters}
        if new:
            from peft.tuners.tuners_utils import BaseTunerLayer

            self._tuned = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
            self.adapters |= new
        return new

    def _check_unmerged(self, doing: str) -> None:
        if self._unmerged:
            raise ValueError(
                f"{doing}: the adapter {self._merged!r} is merged into the base weights; unmerge it before"
            )

    def remove_adapter(self, name: str) -> None:
        """Take the adapter `name` out of the model; the one that was active stays active.

        Raises:
            ValueError: it is merged into the weights.
        """
        self._check_unmerged(f"removing the adapter {name!r}")
        for layer in self._tuned:
            layer.delete_adapter(name)
        del self.adapters[name]
        getattr(self.model, "peft_config", {}).pop(name, None)  # peft's own list, see `adopt_adapters`

    def train_adapter(self, name: str) -> None:
        """Make the adapter `name` the active and only trainable one, its weights in float32.

        Raises:
            ValueError: there is none of this name, or one is merged into the weights.
        """
        if name not in self.adapters:
            raise ValueError(f"adapter={name!r}: the model has {', '.join(self.adapters) or 'no adapter'}")
        self._check_unmerged(f"training the adapter {name!r}")
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
        """Run the block with adapter `name` (None: the bare model), then restore the one that was on.

        Where another one is merged into the base weights, these are put back for the block, bit for bit.

        Raises:
            ValueError: there is none of this name, or `merge_adapter` did not keep the base weights.
        """
        if name is not None and name not in self.adapters:
            raise ValueError(f"adapter={name!r}: the model has {', '.join(self.adapters) or 'no adapter'}")
        if self._unmerged and name == self._merged:
            yield
            return
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self._tuned]
        merged = self._take_out_merged()
        self._activate(name)
        try:
            yield
        finally:
            for layer, (disabled, active) in zip(self._tuned, before):
                layer._disable_adapters, layer._active_adapter = disabled, active
            self._put_back_merged(merged)

    @torch.no_grad()
    def _take_out_merged(self) -> list[Tensor]:
        """Put the base weights back for a while; returns the merged ones, in host memory."""
        self._check_kept()
        merged = []
        for layer, weight in self._unmerged:
            held = layer.get_base_layer().weight
            merged.append(held.detach().to("cpu", copy=True))
            held.copy_(weight)
            layer.merged_adapters.clear()
        return merged

    @torch.no_grad()
    def _put_back_merged(self, merged: list[Tensor]) -> None:
        for (layer, _), weight in zip(self._unmerged, merged):
            layer.get_base_layer().weight.copy_(weight)
            layer.merged_adapters.append(self._merged)

    def _check_kept(self) -> None:
        if any(weight is None for _, weight in self._unmerged):
            raise ValueError("the adapter was merged for good (keep=False): load the model again")

    @torch.no_grad()
    def merge_adapter(self, *, keep: bool = True) -> None:
        """Add the active adapter into the base weights, in place, so that running it costs nothing.

        Args:
            keep: hold the base weights in host memory, for `unmerge_adapter` to put back bit for bit.

        Raises:
            ValueError: the base weights are quantised.
        """
        from .frozen import dense_weight

        for layer in self._tuned:
            if layer.merged or layer._disable_adapters:
                continue
            weight = dense_weight(layer.get_base_layer())
            self._unmerged.append((layer, weight.detach().to("cpu", copy=True) if keep else None))
            layer.merge()
            (self._merged,) = layer.merged_adapters

    @torch.no_grad()
    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`. Raises ValueError where it did not keep the base weights."""
        self._check_kept()
        for layer, weight in self._unmerged:
            layer.get_base_layer().weight.copy_(weight)
            layer.merged_adapters.clear()
        self._unmerged.clear()
        self._merged = None

    def bare_state(self) -> dict[str, Tensor]:
        """The bare model's weights (no adapters) under the names that transformers gives them, each whole.

        Raises:
            ValueError: an adapter is merged into the weights.
        """
        if self._unmerged:
            raise ValueError("the adapter is merged into the base weights: unmerge it before saving")
        state = whole_state(self.model)
        return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}

    def save(self, folder: str | Path) -> None:
        """Write `bare_state` as safetensors so that `from_pretrained` reads it back."""
        state = self.bare_state()
        if writes(self.model):
            self.model.save_pretrained(folder, state_dict=state)
