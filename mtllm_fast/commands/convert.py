"""mtllm convert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro


@dataclass
class Convert:
    """Read a model in a published layout (--from) into an MTLLM folder, or write one with LoRA merged (--to).

    --from encoder and --from llm take a Hugging Face model as it is, as a reader without a head: `mtllm evaluate` reads
    it by a linear probe on its frozen pooled states.

    --to merged gives an MTLLM folder that needs nothing else: no adapters, and an LLM in OUTPUT/llm that
    `AutoModelForCausalLM.from_pretrained` reads. With --push-to-hub alone, MODEL goes to the hub as it is.
    Example: mtllm convert --model runs/sib200 --to merged --output runs/sib200-merged --push-to-hub me/sib200
    """

    REQUIRED: ClassVar = {
        "model": "required",
        "output": "required, unless MODEL is only pushed",
        "source": "required, or `to`",
        "target": "required, or `from`",
    }
    model: str = ""
    """Folder to read."""
    output: str = ""
    """Folder to write; none where the model is only pushed."""
    source: Annotated[Literal["nllb-llm2vec", "encoder", "llm"] | None, tyro.conf.arg(name="from")] = None
    """What MODEL is: a published layout, or a bare model; OUTPUT becomes an MTLLM folder."""
    target: Annotated[Literal["nllb-llm2vec", "merged"] | None, tyro.conf.arg(name="to")] = None
    """Layout of OUTPUT: the published one, or an MTLLM folder with LoRA merged."""
    overwrite: bool = False
    """Replace a model that OUTPUT holds already."""
    push_to_hub: str = ""
    """NAME or ORGANISATION/NAME: where the model goes on the Hugging Face hub (private, if it is new)."""

    def run(self) -> None:
        from ..models import MTLLM
        from ..models.hub import check_push, push
        from ..models.merge import save_merged
        from ..models.nllb_llm2vec import load_nllb_llm2vec, save_nllb_llm2vec

        if not self.model:
            raise ValueError("--model is missing")
        if self.push_to_hub and not (self.source or self.target or self.output):
            print(f"convert: {self.model} -> {push(self.model, self.push_to_hub)}")
            return
        if not self.output:
            raise ValueError("--output is missing")
        if (self.source is None) == (self.target is None):
            raise ValueError("give exactly one of --from and --to")
        if not self.overwrite and (Path(self.output) / "config.json").exists():
            raise ValueError(f"--output {self.output}: holds a model already; pass --overwrite to replace it")
        if self.push_to_hub:
            check_push(self.push_to_hub)
        if self.source in ("encoder", "llm"):
            bases: dict[str, Any] = {self.source: self.model}
            MTLLM.stack(reader=self.source, **bases).save_pretrained(self.output)
        elif self.source:
            load_nllb_llm2vec(self.model).save_pretrained(self.output)
        elif self.target == "merged":
            save_merged(MTLLM.from_pretrained(self.model), self.output)
        else:
            save_nllb_llm2vec(MTLLM.from_pretrained(self.model), self.output)
        way = f"from {self.source}" if self.source else f"to {self.target}"
        print(f"convert: {self.model} -> {self.output} ({way})")
        if self.push_to_hub:
            print(f"convert: {self.output} -> {push(self.output, self.push_to_hub)}")
