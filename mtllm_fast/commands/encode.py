"""mtllm encode."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..data.read import read_rows
from .files import output_file


@dataclass
class Encode:
    """Embed the texts of a file: mean-pooled last hidden states, one float32 row per text, in the order of the file."""

    model: str = ""
    """MTLLM folder."""
    input: str = ""
    """.txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    output: str = ""
    """The .npy file to write, (N, D) float32."""
    text_column: str = "text"
    language: str = "eng_Latn"
    """MT code of the texts' language."""
    language_column: str | None = None
    normalize: bool = False
    """Scale every embedding to length 1."""
    max_tokens: int = 8192
    overwrite: bool = False

    def run(self) -> None:
        import numpy as np

        from ..inference import Engine
        from ..models import MTLLM

        output = output_file(self, (".npy",))
        rows = read_rows(
            self.input, text_column=self.text_column, language=self.language, language_column=self.language_column
        )
        engine = Engine(MTLLM.from_pretrained(self.model), max_tokens=self.max_tokens)
        raw, temporary = (output.with_name(f".{output.name}.{os.getpid()}{end}") for end in (".raw", ""))
        count = 0
        try:
            with raw.open("wb") as handle:  # the number of rows is known only at the end, and .npy starts with it
                for part in engine.encode_rows(rows):
                    if self.normalize:
                        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
                    handle.write(part.tobytes())
                    count += len(part)
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, engine.model.hidden_size)}
            with temporary.open("wb") as handle, raw.open("rb") as source:
                np.lib.format.write_array_header_1_0(handle, header)
                while block := source.read(1 << 22):
                    handle.write(block)
            os.replace(temporary, output)
        finally:
            raw.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
        skipped = rows.counts.empty + rows.counts.failed
        print(
            f"encode: {count} x {engine.model.hidden_size} -> {output}; "
            f"{engine.truncated} truncated, {skipped} rows skipped"
        )
