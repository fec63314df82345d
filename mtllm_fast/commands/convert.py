"""mtllm convert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro


@dataclass
class Convert:
    """Read a model in a published layout (--from) into an MTLLM folder, or write one, LoRA merged or swapped (--to).

    --from encoder and --from llm take a Hugging Face model as it is, as a reader without a head: `mtllm evaluate` reads
    it by a linear probe on its frozen pooled states.

    --to merged gives an MTLLM folder that needs nothing else: no adapters, and an LLM in OUTPUT/llm that
    `AutoModelForCausalLM.from_pretrained` reads; an encoder with a LoRA is merged too, into one in OUTPUT/encoder that
    can be stacked anew. With --push-to-hub alone, MODEL goes to the hub as it is.

    --to encoder writes the encoder of MODEL by itself, from `mtllm compress`, with its tokenizer: a Hugging Face folder
    that `--encoder` of the other commands takes.

    --to swapped is stage 3 without training (arXiv 2410.01335): MODEL, from `mtllm adapt`, keeps its adapter in the
    outer layers of the LLM and gets the task teacher's in the inner ones, and its head. The two layers where they meet
    change by the mean of both. The result is one adapter of both ranks together, which `distill` can go on from.
    Example: mtllm convert --model runs/sib200 --to merged --output runs/sib200-merged --push-to-hub me/sib200
    """

    REQUIRED: ClassVar = {
        "model": "required",
        "output": "required, unless MODEL is only pushed",
        "source": "required, or `to`",
        "target": "required, or `from`",
        "teacher": "required with --to swapped",
    }
    model: str = ""
    """Folder to read."""
    output: str = ""
    """Folder to write; none where the model is only pushed."""
    source: Annotated[
        Literal["nllb-llm2vec", "langbridge", "mindmerger", "encoder", "llm"] | None, tyro.conf.arg(name="from")
    ] = None
    """What MODEL is: a published layout (of mindmerger, its pytorch_model.bin), or a bare model; OUTPUT becomes an
    MTLLM folder."""
    encoder: str = ""
    """Base encoder of a mindmerger mapping; of a langbridge model, where it is, if not where its config says."""
    llm: str = ""
    """Base LLM, likewise."""
    target: Annotated[Literal["nllb-llm2vec", "merged", "swapped", "encoder"] | None, tyro.conf.arg(name="to")] = None
    """Layout of OUTPUT: the published one, or an MTLLM folder with LoRA merged, or with layers of the teacher's, or a
    plain encoder."""
    teacher: str = ""
    """Task teacher (from `mtllm finetune --llm`) whose inner layers and head are taken, for --to swapped."""
    bottom: int | None = None
    """Lowest layers that stay MODEL's, for --to swapped; by default as 5 are to 32 layers."""
    top: int | None = None
    """Highest layers that stay MODEL's, likewise; by default as 2 are to 32 layers."""
    between: int | None = None
    """Layers next to those, on either side, that change by the mean of both; by default 1."""
    overwrite: bool = False
    """Replace a model that OUTPUT holds already."""
    push_to_hub: str = ""
    """NAME or ORGANISATION/NAME: where the model goes on the Hugging Face hub (private, if it is new)."""

    def run(self) -> None:
        from ..models import MTLLM
        from ..models.hub import check_push, push
        from ..models.merge import save_encoder, save_merged
        from ..models.nllb_llm2vec import load_nllb_llm2vec, save_nllb_llm2vec
        from ..models.published import load_langbridge, load_mindmerger
        from ..training.layer_swap import swap_layers
        from .files import check_given

        check_given(self, "model")
        if self.push_to_hub and not (self.source or self.target or self.output):
            print(f"convert: {self.model} -> {push(self.model, self.push_to_hub)}")
            return
        check_given(self, "output")
        if (self.source is None) == (self.target is None):
            raise ValueError("give exactly one of --from and --to")
        if self.target == "swapped":
            check_given(self, "teacher")
        for name in ("teacher", "bottom", "top", "between"):
            if self.target != "swapped" and getattr(self, name) not in ("", None):
                raise ValueError(f"--{name} {getattr(self, name)}: goes with --to swapped alone")
        if self.source == "mindmerger" and not (self.encoder and self.llm):
            raise ValueError(f"--{'llm' if self.encoder else 'encoder'} is missing: the mapping holds no base models")
        for name in ("encoder", "llm"):
            if self.source not in ("mindmerger", "langbridge") and (value := getattr(self, name)):
                raise ValueError(f"--{name} {value}: goes with --from mindmerger and --from langbridge alone")
        if not self.overwrite and (Path(self.output) / "config.json").exists():
            raise ValueError(f"--output {self.output}: holds a model already; pass --overwrite to replace it")
        if self.push_to_hub:
            check_push(self.push_to_hub)
        if self.source in ("encoder", "llm"):
            bases: dict[str, Any] = {self.source: self.model}
            MTLLM.stack(reader=self.source, **bases).save_pretrained(self.output)
        elif self.source == "mindmerger":
            load_mindmerger(self.model, self.encoder, self.llm).save_pretrained(self.output)
        elif self.source == "langbridge":
            bases = {"encoder": self.encoder or None, "llm": self.llm or None}
            load_langbridge(self.model, **bases).save_pretrained(self.output)
        elif self.source:
            load_nllb_llm2vec(self.model).save_pretrained(self.output)
        elif self.target == "merged":
            save_merged(MTLLM.from_pretrained(self.model), self.output)
        elif self.target == "encoder":
            save_encoder(MTLLM.from_pretrained(self.model), self.output)
        elif self.target == "swapped":
            swap_layers(self.model, self.teacher, self.bottom, self.top, self.between).save_pretrained(self.output)
        else:
            save_nllb_llm2vec(MTLLM.from_pretrained(self.model), self.output)
        way = f"from {self.source}" if self.source else f"to {self.target}"
        print(f"convert: {self.model} -> {self.output} ({way})")
        if self.push_to_hub:
            print(f"convert: {self.output} -> {push(self.output, self.push_to_hub)}")
