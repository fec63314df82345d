"""`mtllm` with one fault built in, as `faults` starts it: python -m benchmarks.studies.faulty FAULT ARGUMENTS..."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import Any

import torch

MARK = "zebra"  # in the row that brings the fault


def install(fault: str) -> None:
    """Change the functions in which `fault` shows."""
    from mtllm_fast.data import collate, text_tokens
    from mtllm_fast.training.stage import Stage

    plain, tokenise_readable, encode, calls = Stage.forward, collate.tokenise_readable, text_tokens._encode, [0]

    def forward(step: Any, batch: Any) -> Any:
        calls[0] += 1
        if fault == "memory" and batch.num_rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        terms = plain(step, batch)
        marked = MARK in step.student.tokenizer.llm.decode(batch.llm.input_ids)
        if (fault == "nan" and marked) or (fault == "nan from then on" and calls[0] > 50):
            return {name: term._replace(sum=term.sum * float("nan")) for name, term in terms.items()}
        return terms

    def read(rows: Any, *rest: Any) -> Any:
        in_worker = multiprocessing.parent_process() is not None
        if fault == "crash" and in_worker and any(MARK in row.text for row in rows):
            os.kill(os.getpid(), signal.SIGSEGV)
        return tokenise_readable(rows, *rest)

    def encoded(tokenizer: Any, texts: list[str], *rest: Any) -> Any:
        if fault == "tokenizer" and any(MARK in text for text in texts):
            raise text_tokens.BadText(f"the tokenizer fails on {texts[0][:40]!r}: injected")
        return encode(tokenizer, texts, *rest)

    Stage.forward, collate.tokenise_readable, text_tokens._encode = forward, read, encoded  # type: ignore[method-assign]


def main() -> None:
    """Install the fault and go on as `mtllm`."""
    from mtllm_fast.cli import main as mtllm

    install(sys.argv[1])
    mtllm(sys.argv[2:])


if __name__ == "__main__":
    main()
