"""mtllm tokenize."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .options import TextOptions, check_text


@dataclass
class Tokenize(TextOptions):
    """Tokenise text once, on both sides, into memory-mapped files that `mtllm adapt --text FOLDER` reads.

    A run on many GPUs then tokenises nothing, and every process reads only its own batches. A call that was killed
    goes on where it was.
    Example: mtllm tokenize --encoder NLLB --llm LLAMA --text HuggingFaceFW/fineweb:sample-10BT --output tokens
    """

    REQUIRED: ClassVar = {"encoder": "required", "llm": "required", "text": "required", "output": "required"}
    encoder: str = ""
    """Encoder: folder or hub name, of a family that `adapt` supports (its help names them)."""
    llm: str = ""
    """Causal LM: folder or hub name."""
    text: str = ""
    """Text to read: .txt, .jsonl, .csv, .tsv or .parquet (also .gz), a folder or glob of them, a hub dataset "org/name"
    or "org/name:config"."""
    output: str = ""
    """Folder to write."""
    max_length: int = 512
    """Longer texts are truncated to this many tokens by each tokenizer, and counted."""
    shard_rows: int = 65536
    """Rows of one shard; a call that goes on repeats at most so many."""

    def run(self) -> None:
        from ..data.store import write_store
        from ..inference.progress import progress_bar
        from ..jobs.durable import check_folder_above
        from ..models import MTLLMConfig
        from ..models.encoder import check_encoder, fit_tokenizer
        from ..models.storage import base_tokenizer
        from .files import check_given, check_least

        check_given(self, "encoder", "llm", "text", "output")
        check_least(self, limit=1, max_length=1, shard_rows=1)
        check_folder_above("--output", Path(self.output) / "store")
        check_text(self.text)
        config = check_encoder(self.encoder)
        rows = self.rows(self.text)
        tokenizer = base_tokenizer(MTLLMConfig(encoder=self.encoder, llm=self.llm), self.max_length, self.max_length)
        fit_tokenizer(tokenizer, config, self.encoder)
        seen = 0
        with progress_bar("tokenize", self.limit, True) as advance:

            def report(done: int) -> None:
                nonlocal seen
                advance(done - seen)
                seen = done

            made = write_store(
                rows, tokenizer, self.output, shard_rows=self.shard_rows, source=rows.identity(), on_progress=report
            )
        before = f" ({made.resumed:,} were there before)" if made.resumed else ""
        notes = [f"{count:,} cut on the {side} side" for side, count in made.truncated.items() if count]
        notes += [f"{count:,} rows left out ({why})" for why, count in made.skipped.items() if count]
        print(
            f"tokenize: {made.rows:,} rows{before}, {made.tokens['mt']:,} MT and {made.tokens['llm']:,} LLM tokens -> "
            f"{'; '.join([self.output, *notes])}"
        )
