"""mtllm encode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ..data.language import language_read, reads_language
from .files import check_given, check_least, output_file, ranks, stoppable, tell
from .options import TextOptions


@dataclass
class Encode(TextOptions):
    """Embed the texts of a file: pooled last hidden states, one float32 row per row of the file, in its order.

    A run that was stopped, even by kill -9, goes on where it was when the same command is given again. Under torchrun
    the ranks share the work. Example: mtllm encode --model runs/stack --input corpus.jsonl --output corpus.npy
    """

    COLUMNS: ClassVar = ("pair_column", "id_column")
    REQUIRED: ClassVar = {"model": "required", "input": "required", "output": "required"}
    model: str = ""
    """MTLLM folder."""
    input: str = ""
    """.txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    output: str = ""
    """The file to write: .npy or .safetensors with (N, D) float32, or .parquet with id, language and embedding."""
    pair_column: str | None = None
    """Column of the second text, where rows are pairs."""
    id_column: str | None = None
    """Column with a name per row, for .parquet."""
    language: str | None = None
    """MT code of the texts' language. An encoder with languages needs it or `language_column`; for this release none
    means English, with a warning. Other encoders ignore it."""
    limit: int | None = None
    """Only the first rows, unusable ones not counted."""
    on_bad_row: Literal["nan", "skip", "fail"] = "nan"
    """What becomes of a row that is empty, cannot be read, or is in a language the model has no code for. nan: NaN in
    its place, so that row i of the output is row i of the file; skip: left out, and OUTPUT.index.npy holds the row of
    the file (from 0) of each row of the output; fail: an error. OUTPUT.skipped.tsv lists such rows."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """Which of a text's last hidden states is its embedding: their mean (what the stack is trained on), the first or
    the last."""
    normalize: bool = False
    """Scale every embedding to length 1."""
    max_tokens: int | None = None
    """Token budget of one forward pass; by default 8192 on a GPU, and on a CPU 2**19 over the hidden size, at least 512
    and at most 8192."""
    window: int = 2048
    """Rows that are sorted and packed together, and saved together."""
    encoder: str = ""
    """Where the model's encoder is, if not where it was when the model was saved."""
    llm: str = ""
    """Where the model's LLM is, likewise."""
    device: str | None = None
    """"cpu", "cuda", "cuda:1", ...; by default a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the base models' weights; by default as they are stored."""
    quantize: Literal["int8", "fp8"] | None = None
    """8-bit weights by torchao (pip install 'mtllm-fast[quant]')."""
    compile: bool = False
    """Run the layers through torch.compile: pays off on long inputs."""
    overwrite: bool = False
    """Begin anew even where there is the output or a stopped run."""
    progress: bool = True
    """Show a progress bar; a line now and then where stderr is no terminal."""

    def run(self) -> None:
        import torch

        from ..inference.device import check_device
        from ..inference.engine import Engine
        from ..inference.stream import encode_file
        from ..inference.writers import FORMATS
        from ..models import MTLLM
        from ..models.fusion import READS_ALONE

        check_device(self.device)
        check_least(self, window=1, max_tokens=1, limit=1)
        check_given(self, "model", "input")
        output = output_file(self, tuple(FORMATS))
        rank, world_size, local = ranks()
        rows = self.rows(self.input)
        dtype = getattr(torch, self.dtype) if self.dtype else None
        model = MTLLM.from_pretrained(self.model, dtype=dtype, encoder=self.encoder, llm=self.llm)
        tokenizer = model.require_tokenizer()
        named = "--language" if self.language_column is None else "--language-column"
        code = language_read(
            tokenizer,
            model.side,
            self.language_column or self.language,
            named,
            tell=tell("encode"),
        )
        if self.language_column is None:
            if code is not None and reads_language(tokenizer, model.side):
                tokenizer.language_id(code)
            rows = replace(rows, language=code)
        if model.config.fusion is not None:
            tell("encode")(f"{self.model} {READS_ALONE}")
        if not self.device and torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        engine = Engine(
            model,
            max_tokens=self.max_tokens,
            window=self.window,
            device=device,
            merge_adapters=True,
            quantize=self.quantize,
            compile=self.compile,
        )
        with stoppable("encode"):
            report = encode_file(
                engine,
                rows,
                output,
                pooling=self.pooling,
                normalize=self.normalize,
                on_bad_row=self.on_bad_row,
                settings={"model_folder": self.model, "dtype": self.dtype, "quantize": self.quantize},
                overwrite=self.overwrite,
                rank=rank,
                world_size=world_size,
                progress=self.progress and rank == 0,
            )
        if not report.complete:
            print(f"encode: rank {rank} of {world_size} is done; the last one to finish writes {output}")
            return
        before = f" ({report.resumed} of them by an earlier run)" if report.resumed else ""
        reasons = "; ".join(f"{count} {reason}" for reason, count in report.skipped.items())
        print(
            f"encode: {report.rows} x {model.hidden_size} -> {output}{before}; {report.truncated} truncated, "
            f"{sum(report.skipped.values())} rows {'skipped' if self.on_bad_row == 'skip' else 'unusable: NaN'}"
            + (f" ({reasons}; listed in {report.skipped_file})" if reasons else "")
            + (f"; {report.index_file} says which row each is" if report.index_file else "")
        )
