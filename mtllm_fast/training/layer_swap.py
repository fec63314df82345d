"""Stage 3 without training: the outer layers of the stage-1 adapter, the inner ones of the task teacher's, its head.

The layers that read the encoder and those that end the LLM stay as stage 1 taught them, the ones between are those that
know the task; where the two meet, a layer changes by the mean of what both change it by. The result is one adapter with
the ranks of both in every layer (see `models.adapter_sum`), which all that works on a trained one works on.
Source: arXiv 2410.01335, on whole models; its bottom 5 and top 2 of 32 layers are from the expert in the language, with
one layer of both on either side.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..models import MTLLM, LoraSettings, MTLLMConfig
from ..models.adapter_sum import add_to_adapter
from ..models.loading import load_config, read_safetensors
from ..models.storage import local_folder, read_config
from .task_teacher import check_teacher, teacher_config

OUTER, MEAN, INNER = (1.0, 0.0), (0.5, 0.5), (0.0, 1.0)  # shares of the stage-1 adapter and of the teacher's


def layer_shares(
    count: int, bottom: int | None = None, top: int | None = None, between: int | None = None
) -> list[tuple[float, float]]:
    """Shares of the stage-1 adapter and of the teacher's in each of `count` layers, the lowest first.

    Args:
        bottom, top: layers at either end from stage 1; None: as 5 and 2 are to 32, at least 1.
        between: layers of both next to them, on either side; None: 1.

    Raises:
        ValueError: a number is negative, or together they are more than there are layers.
    """
    bottom = max(1, round(5 * count / 32)) if bottom is None else bottom
    top = max(1, round(2 * count / 32)) if top is None else top
    between = 1 if between is None else between
    for name, value in (("bottom", bottom), ("top", top), ("between", between)):
        if value < 0:
            raise ValueError(f"{name}={value}: must be >= 0")
    inner = count - bottom - top - 2 * between
    if inner < 0:
        raise ValueError(
            f"bottom={bottom}, top={top}, between={between} (on either side): the LLM has {count} layers, "
            f"not {count - inner}"
        )
    return [OUTER] * bottom + [MEAN] * between + [INNER] * inner + [MEAN] * between + [OUTER] * top


def swap_layers(
    model: str, teacher: str, bottom: int | None = None, top: int | None = None, between: int | None = None
) -> MTLLM:
    """The adapted stack in the folder `model` with the inner layers of the task teacher in the folder `teacher`.

    What is adapted outside of the layers (an LM head that `target_modules` names) stays as stage 1 taught it.

    Args:
        bottom, top, between: see `layer_shares`.

    Raises:
        ValueError: before weights are read, where the two do not fit each other or the LLM's layers; a damaged folder.
    """
    adapted, taught = _with_own_llm(read_config(local_folder(model)), model), teacher_config(teacher)
    taught = _with_own_llm(taught, teacher)
    if adapted.reader != "stack" or list(adapted.adapters) != ["student"]:
        raise ValueError(f"model={model!r}: not an adapted stack; make one with `mtllm adapt`")
    head = check_teacher(adapted, taught, teacher)
    if list(taught.adapters) != ["student"]:
        raise ValueError(f"teacher={teacher!r}: has the adapters {', '.join(taught.adapters)}, not one")
    settings = taught.adapters["student"]
    mine, theirs = _targets(adapted.adapters["student"]), _targets(settings)
    if mine != theirs:
        raise ValueError(
            f"teacher={teacher!r}: adapts target_modules={theirs!r}, model={model!r} {mine!r}; layers are swapped "
            "between adapters of the same ones"
        )
    assert adapted.llm is not None
    shares = layer_shares(load_config("llm", adapted.llm).get_text_config().num_hidden_layers, bottom, top, between)

    student, weights = MTLLM.from_pretrained(model), read_safetensors(Path(teacher), "model")
    student.set_head(head)
    expected = {n for n in student.state_dict() if (".lora_" in n and n.startswith("llm.")) or n.startswith("head.")}
    if set(weights) != expected:
        raise ValueError(f"teacher={teacher!r}: its weights do not fit the student's LLM")
    layers = student.require_llm().layers
    (root,) = (name for name, module in student.named_modules() if module is layers)

    def of(name: str) -> tuple[float, float]:
        below = name.removeprefix(f"{root}.")
        return OUTER if below == name else shares[int(below.split(".")[0])]

    add_to_adapter(student, settings, weights, shares=of)
    student.load_state_dict({name: value for name, value in weights.items() if name.startswith("head.")}, strict=False)
    return student.eval()


def _with_own_llm(config: MTLLMConfig, folder: str) -> MTLLMConfig:
    """The config with the LLM's place, which is in the model's own folder where it is not named."""
    return config if config.llm else replace(config, llm=str(local_folder(folder) / "llm"))


def _targets(settings: LoraSettings) -> str | tuple[str, ...]:
    named = settings.target_modules
    return named if isinstance(named, str) else tuple(sorted(named))
