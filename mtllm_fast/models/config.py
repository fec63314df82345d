"""What a model is made of, as it stands in its folder's config.json."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..data.prompt import Prompt
from .adapters import LoraSettings
from .fusion import FusionSettings
from .heads import HeadConfig
from .projection import ProjectionConfig

Reader = Literal["stack", "llm", "encoder"]
READERS: tuple[Reader, ...] = ("stack", "llm", "encoder")
TrainEncoder = Literal["no", "lora", "all"]
ENCODER_ADAPTER = "encoder_student"  # name of the LoRA in the encoder of a stack; those of the LLM have other names
MODEL_TYPE = "mtllm"  # what config.json calls itself
FORMAT = 1
BESIDE = "beside"  # in config.json: base models' folders relative to the model's


@dataclass
class MTLLMConfig:
    """Everything needed to rebuild a model around its base models.

    encoder, llm: folder or hub name of the base models (None where they are stored inside the model's own folder).
    adapters: LoRA of the backbone, by name.
    prompt: what a model that was taught to write reads around a text; None for one that was not.
    encoder_adapter: LoRA of a stack's encoder; None without one.
    fusion: layers of the encoder that read a text and its translation end to end; None for none.
    """

    reader: Reader = "stack"
    encoder: str | None = None
    llm: str | None = None
    causal: bool = False
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    adapters: dict[str, LoraSettings] = field(default_factory=dict)
    head: HeadConfig | None = None
    prompt: Prompt | None = None
    encoder_adapter: LoraSettings | None = None
    fusion: FusionSettings | None = None

    @property
    def labels(self) -> list[str] | None:
        """The head's label names in logit order, None without a classification head."""
        return list(self.head.labels) if self.head and self.head.kind == "classification" else None


def config_to_dict(config: MTLLMConfig) -> dict[str, Any]:
    data = {"model_type": MODEL_TYPE, "format": FORMAT, **asdict(config)}
    if config.prompt is None:  # as earlier versions wrote it
        del data["prompt"]
    if config.encoder_adapter is None:
        del data["encoder_adapter"]
    if config.fusion is None:
        del data["fusion"]
    if not config.projection.boundary:
        del data["projection"]["boundary"]
    if config.projection.activation == "relu":
        del data["projection"]["activation"]
    return data


def config_from_dict(data: dict[str, Any], folder: str) -> MTLLMConfig:
    if data.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model={folder!r}: its config.json is of a {data.get('model_type')!r} model, not of an MTLLM "
            "(which `mtllm adapt` makes)"
        )
    if data.get("format") != FORMAT:
        raise ValueError(
            f"model={folder!r}: format {data.get('format')!r} is not readable by this version (it reads {FORMAT})"
        )
    head = data["head"]
    return MTLLMConfig(
        reader=data["reader"],
        encoder=data["encoder"],
        llm=data["llm"],
        causal=data["causal"],
        projection=ProjectionConfig(**data["projection"]),
        adapters={name: _settings(**settings) for name, settings in data["adapters"].items()},
        head=HeadConfig(head["kind"], tuple(head["labels"])) if head else None,
        prompt=Prompt(**data["prompt"]) if data.get("prompt") else None,
        encoder_adapter=_settings(**data["encoder_adapter"]) if data.get("encoder_adapter") else None,
        fusion=FusionSettings(**data["fusion"]) if data.get("fusion") else None,
    )


def _settings(target_modules: Any, **settings: Any) -> LoraSettings:
    return LoraSettings(
        **settings, target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules)
    )


def read_config(path: Path, role: str = "model") -> MTLLMConfig:
    """The config of a model folder; base models that moved with it are named where they are now.

    Args:
        role: the argument that `path` is of, for errors.

    Raises:
        ValueError: `path` is no MTLLM folder.
    """
    if not path.is_dir():
        raise ValueError(f"{role}={str(path)!r}: no such folder")
    if not (path / "config.json").is_file():
        raise ValueError(f"{role}={str(path)!r}: the folder holds no config.json, so it is not a (complete) model")
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{role}={str(path)!r}: its config.json is damaged ({error})") from error
    config = config_from_dict(data, str(path))
    for role, relative in data.get(BESIDE, {}).items():
        name, moved = getattr(config, role), Path(os.path.normpath(path.resolve() / relative))
        if name is not None and not Path(name).exists() and moved.is_dir():
            setattr(config, role, str(moved))
    return config


def based_on(config: MTLLMConfig, folder: str, encoder: str | None, llm: str | None) -> MTLLMConfig:
    """The config of the model in `folder` with other places for its base models.

    Raises:
        ValueError: the model does not read through one that is named.
    """
    for role, name, without in (("encoder", encoder, "llm"), ("llm", llm, "encoder")):
        if name and config.reader == without:
            raise ValueError(f"{role}={name!r}: model={folder!r} is of reader={config.reader!r} and has no {role}")
        if name:
            config = replace(config, **{role: name})  # type: ignore[arg-type]
    return config
