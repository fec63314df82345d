"""What is compared: a model under its name, in one or more seeds, which reads a task itself or by translate-test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..data.prompt import Prompt
from ..jobs.fingerprint import hub_config, of_model
from .scorers import check_labels
from .tasks import Task

if TYPE_CHECKING:
    from ..inference.engine import Engine
    from ..inference.translator import Translator
    from ..models import MTLLM, MTLLMConfig

    Model = MTLLM | Engine | str | Path
    Models = Model | Sequence[Model] | Mapping[str, Model | Sequence[Model]]

Dtype = Literal["float32", "bfloat16", "float16"]
Reading = Literal["head", "likelihood", "generation", "probe"]
TRANSLATE_TEST = "translate-test"


@dataclass(frozen=True, eq=False)
class System:
    """A model under its name. `translator` or `translations` make it a translate-test.

    Fields:
        models: one per seed.
        translator: an MT model, or its folder or hub name; it is loaded when first needed, and shared by the seeds.
        translations: where translations are that exist already.
        partners: translations likewise, which models that read a text together with its translation read beside it.
        target, num_beams: the language translated into and how.
        device: where a translator given by name runs.
    """

    name: str
    models: Sequence[Model]
    translator: Translator | str | Path | None = None
    translations: str | Path | None = None
    target: str = "eng_Latn"
    num_beams: int = 1
    device: str | None = None
    partners: str | Path | None = None

    @property
    def translates(self) -> bool:
        return self.translator is not None or self.translations is not None

    @cached_property
    def loaded_translator(self) -> Translator | None:
        from ..inference.translator import Translator

        if not isinstance(self.translator, str | Path):
            return self.translator
        return Translator.from_pretrained(self.translator, device=self.device)

    @cached_property
    def fused(self) -> bool:
        """Whether its models read a text together with its translation (`finetune --fusion.layers`).

        Raises:
            ValueError: some seeds do and others do not.
        """
        found = {config is not None and config.fusion is not None for config in map(config_of, self.models)}
        if len(found) > 1:
            raise ValueError(f"model={self.name!r}: some of its seeds read texts with translations: no mean over both")
        return found == {True}

    def check(self, task: Task, prompt: Prompt | None = None) -> None:
        """Before anything is loaded.

        Raises:
            ValueError: a folder that is no model, or that cannot answer the task; some seeds have a head and others do
                not.
        """
        headless: dict[str, bool] = {}
        for model in self.models:
            if (config := _local_config(model)) is not None:
                headless[str(model)] = config.head is None
                if reading(config, task, prompt, str(model)) == "head":
                    check_labels(config.labels, task, str(model))
        if len(set(headless.values())) > 1:
            without = next(name for name, missing in headless.items() if missing)
            raise ValueError(
                f"model={self.name!r}: its seed {without!r} has no task head, others have one: no mean over both"
            )

    def fingerprint(self, index: int) -> str:
        """Of the model of one seed, and of the translator."""
        parts = [_fingerprint(self.models[index], self.name)]
        if self.translator is not None:
            parts.append(_fingerprint(self.translator, "translator"))
        return " ".join(parts)


def named_systems(models: Models) -> list[System]:
    """One per model, or per entry of a mapping.

    Raises:
        ValueError: no seeds, a name that is given twice, or that of the baseline.
    """
    if isinstance(models, Mapping):
        systems = [System(str(name), _listed(seeds)) for name, seeds in models.items()]
        for system in systems:
            if not system.models:
                raise ValueError(f"models: {system.name!r} has no seeds")
            if system.name == TRANSLATE_TEST:
                raise ValueError(f"models: {system.name!r} is the name of the baseline; choose another")
        return systems
    listed = _listed(models)
    names = [
        str(model) if isinstance(model, str | Path) else "model" if len(listed) == 1 else f"model {number}"
        for number, model in enumerate(listed, 1)
    ]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"models: {name!r} is given twice")
    return [System(name, [model]) for name, model in zip(names, listed, strict=True)]


def translate_test(
    translator: Translator | str | Path | None,
    translations: str | Path | None,
    teacher: Model | Sequence[Model] | None,
    *,
    target: str,
    num_beams: int,
    device: str | None,
) -> System | None:
    """The baseline; None where nothing of it is given. Raises ValueError where only a part of it is."""
    if (translator is None and translations is None) != (teacher is None):
        raise ValueError(
            "translator and teacher: translate-test needs both, an MT model (or translations) and a classifier of its "
            "output"
        )
    if translator is not None and translations is not None:
        raise ValueError("translator and translations: give one of them")
    if teacher is None:
        return None
    return System(TRANSLATE_TEST, _listed(teacher), translator, translations, target, num_beams, device)


def _listed(models: Model | Sequence[Model]) -> list[Model]:
    return list(models) if isinstance(models, list | tuple) else [cast("Model", models)]


def load_engine(model: Model, *, device: str | None, dtype: Dtype | None, max_tokens: int | None) -> Engine:
    """An engine around a model; one that is an engine already stays as it is."""
    import torch

    from ..inference.engine import Engine
    from ..models import MTLLM

    if isinstance(model, str | Path):
        model = MTLLM.from_pretrained(model)
        if model.dtype == torch.float32:  # a sum in fewer bits than fp32 would lose a part of the adapter
            for part in (model.encoder, model.llm):
                if part is not None:
                    part.merge_adapter(keep=False)
        if dtype is not None:
            model = model.to(getattr(torch, dtype))
        device = device or ("cuda" if torch.cuda.is_available() else None)
    if not isinstance(model, MTLLM):
        return model
    return Engine(model, max_tokens=max_tokens, device=device)


def reading(config: MTLLMConfig, task: Task, prompt: Prompt | None, name: str) -> Reading:
    """How a model answers a task: by its head; without one by what it would write after its prompt; else by a probe.

    Args:
        prompt: for a model that has none of its own.

    Raises:
        ValueError: the answer has to be written, and the model has no prompt, no LLM or one that cannot.
    """
    writes = config.reader != "encoder" and config.causal
    prompt = config.prompt or prompt
    if task.kind == "generated":
        if not writes:
            lacks = "no LLM" if config.reader == "encoder" else "a bidirectional LLM"
            raise ValueError(
                f"model={name!r}: has {lacks}, and the answers of {task.name!r} are written by a causal one"
            )
        if prompt is None:
            raise ValueError(
                f"model={name!r}: was not taught to write (`mtllm sft`), and {task.name!r} wants written answers; name "
                "the prompt that it is to answer (before, after)"
            )
        return "generation"
    if config.head is not None:
        return "head"
    return "likelihood" if writes and prompt is not None else "probe"


def config_of(model: Model) -> MTLLMConfig | None:
    """The config of a model; None for a hub name whose config cannot be had."""
    from ..models.storage import read_config

    if not isinstance(model, str | Path):
        inner: Any = getattr(model, "model", model)  # an engine's
        return inner.config  # type: ignore[no-any-return]
    config = _local_config(model)
    if config is None and (path := hub_config(str(model))) is not None:
        config = read_config(path.parent)
    return config


def _local_config(model: Model) -> MTLLMConfig | None:
    from ..models.storage import read_config

    local = isinstance(model, str | Path) and (Path(model).exists() or str(model).startswith((".", "/", "~")))
    return read_config(Path(str(model))) if local else None


def _fingerprint(model: Model | Translator, name: str) -> str:
    if not isinstance(model, str | Path):
        raise ValueError(
            f"cells: {name!r} is a {type(model).__name__} in memory; give its folder, by which finished cells are known"
        )
    return of_model(model)
