"""mtllm translate."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from ..data.read import read_rows
from .files import output_file, windows


@dataclass
class Translate:
    """Translate the texts of a file; the result is a .jsonl file with id, language, text and translation."""

    model: str = ""
    """MT model: folder or hub name."""
    input: str = ""
    """.txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, or a hub dataset."""
    output: str = ""
    """The .jsonl file to write."""
    text_column: str = "text"
    language: str = "eng_Latn"
    """MT code of the texts' language."""
    language_column: str | None = None
    target: str = "eng_Latn"
    num_beams: int = 1
    max_tokens: int = 8192
    overwrite: bool = False

    def run(self) -> None:
        from ..evaluation import Translator

        output = output_file(self, (".jsonl",))
        rows = read_rows(
            self.input, text_column=self.text_column, language=self.language, language_column=self.language_column
        )
        translator = Translator.from_pretrained(self.model)
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        count = 0
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                for window in windows(rows, 1024):
                    codes = [row.language for row in window]
                    settings = {"num_beams": self.num_beams, "max_tokens": self.max_tokens}
                    texts = translator.translate([row.text for row in window], codes, self.target, **settings)  # type: ignore[arg-type]
                    for row, text in zip(window, texts):
                        record = {"id": row.id, "language": row.language, "text": row.text, "translation": text}
                        handle.write(json.dumps(record, ensure_ascii=False) + "\n")
                    count += len(window)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
        print(
            f"translate: {count} texts to {self.target} -> {output}; "
            f"{translator.truncated} truncated, {translator.unfinished} met the length limit"
        )
