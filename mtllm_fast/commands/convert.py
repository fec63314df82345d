"""mtllm convert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Convert:
    """Read a model in a published layout (--from) into an MTLLM folder, or write one in it, LoRA merged (--to)."""

    model: str = ""
    """Folder to read."""
    output: str = ""
    """Folder to write."""
    source: Annotated[Literal["nllb-llm2vec"] | None, tyro.conf.arg(name="from")] = None
    target: Annotated[Literal["nllb-llm2vec"] | None, tyro.conf.arg(name="to")] = None
    overwrite: bool = False

    def run(self) -> None:
        from ..models import MTLLM
        from ..models.nllb_llm2vec import load_nllb_llm2vec, save_nllb_llm2vec

        for name in ("model", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if (self.source is None) == (self.target is None):
            raise ValueError("give exactly one of --from and --to")
        if not self.overwrite and (Path(self.output) / "config.json").exists():
            raise ValueError(f"--output {self.output}: holds a model already; pass --overwrite to replace it")
        if self.source:
            load_nllb_llm2vec(self.model).save_pretrained(self.output)
        else:
            save_nllb_llm2vec(MTLLM.from_pretrained(self.model), self.output)
        print(f"convert: {self.model} -> {self.output} ({'from' if self.source else 'to'} nllb-llm2vec)")
