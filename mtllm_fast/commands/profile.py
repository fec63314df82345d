"""mtllm profile."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

from ..losses import DistillationWeights
from ..models import LoraSettings


@dataclass
class Profile:
    """Where the time of one step goes: tokenise, pack, transfer, encoder, projection, LLM, loss, backward, optimizer.

    Example: mtllm profile --encoder NLLB --llm LLAMA --text F.jsonl --bf16 --trace trace.json
    """

    REQUIRED: ClassVar = {
        "text": "required",
        "model": "required, or `encoder` and `llm`",
        "encoder": "required without `model`",
        "llm": "required without `model`",
    }
    model: str = ""
    """A saved stack; or name encoder and llm."""
    encoder: str = ""
    """Encoder: folder or hub name, of a family that `adapt` supports."""
    llm: str = ""
    """Causal LM: folder or hub name."""
    text: str = ""
    """Text to read: .txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    text_column: str = "text"
    """Column of the text."""
    language: str | None = None
    """MT code of the text's language; by default the encoder's own code for English."""
    quoted: bool = True
    """Quote marks in .csv and .tsv files stand around fields; without, they are text."""
    mode: Literal["adapt", "encode"] = "adapt"
    """adapt: a training step of general adaptation; encode: pooled embeddings."""
    loss: DistillationWeights = field(default_factory=DistillationWeights)
    lora: LoraSettings = field(default_factory=LoraSettings)
    tokens: int = 4096
    """Token budget of a pack."""
    max_length: int = 512
    """Longer texts are cut to this many tokens."""
    steps: int = 5
    """Steps that are timed; the table shows their medians."""
    rows: int = 4096
    """Texts that are read."""
    bf16: bool = False
    """bf16 autocast; on a GPU the weights are bf16, too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    trace: str = ""
    """Write a Chrome trace of one more step to this file (chrome://tracing, Perfetto)."""
    json: str = ""
    """Also write the figures to this file, for `mtllm report`."""

    def run(self) -> None:
        import torch
        from rich.console import Console
        from rich.table import Table

        from ..data.read import read_rows
        from ..models import MTLLM
        from ..planning.profile import profile_steps
        from .files import check_least, check_written
        from .options import check_text

        if bool(self.model) == bool(self.encoder and self.llm):
            raise ValueError("name either --model, or both --encoder and --llm")
        if not self.text:
            raise ValueError("--text is missing: name a file, folder, glob or hub dataset")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA device is visible; see `mtllm doctor`")
        device = "cuda" if torch.cuda.is_available() and self.device != "cpu" else "cpu"
        check_least(self, tokens=1, max_length=1, steps=1, rows=1)
        check_written(self, "trace", "json")
        check_text(self.text)
        read = read_rows(self.text, text_column=self.text_column, language=self.language, quoting=self.quoted)
        rows = list(islice(read, self.rows))
        if not rows:
            raise ValueError(f"--text {self.text}: holds no usable row")
        dtype = torch.bfloat16 if self.bf16 and device == "cuda" else torch.float32
        if self.model:
            model = MTLLM.from_pretrained(self.model, dtype=dtype)
        else:
            model = MTLLM.stack(self.encoder, self.llm, lora=self.lora, dtype=dtype)
        tokenizer = model.require_tokenizer()
        tokenizer.max_mt_tokens = tokenizer.max_llm_tokens = min(self.max_length, self.tokens)
        result = profile_steps(
            model.to(device),
            rows,
            mode=self.mode,
            loss=self.loss,
            tokens=self.tokens,
            steps=self.steps,
            bf16=self.bf16,
            trace=self.trace or None,
        )
        medians = result.medians()
        whole = sum(medians.values())
        shown = Table(title=f"one {self.mode} step on {device}, median of {self.steps}", title_justify="left")
        for name in ("part", "ms", "share"):
            shown.add_column(name, justify="left" if name == "part" else "right")
        for part, seconds in medians.items():
            shown.add_row(part, f"{1e3 * seconds:.2f}", f"{seconds / whole:.1%}")
        shown.add_row("whole step", f"{1e3 * whole:.2f}", "")
        console = Console()
        console.print(shown)
        tokens = sum(result.mt_tokens) or sum(result.llm_tokens)
        console.print(
            f"{sum(result.texts) / whole / self.steps:,.1f} texts/s, {tokens / whole / self.steps:,.0f} tokens/s, "
            f"{tokens / self.steps / self.tokens:.1%} of the token budget used",
            highlight=False,
        )
        if self.trace:
            console.print(f"trace: {self.trace}", highlight=False)
        if self.json:
            record = {"settings": asdict(self), "medians": medians, **asdict(result)}
            Path(self.json).write_text(json.dumps(record, indent=1), encoding="utf-8")
