"""`mtllm demo --ask TEXT`: the demo's model reads one sentence of the user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .rows import TOPICS


def ask(text: str, output: str | Path) -> str:
    """The topic that the model of an earlier demo in `output` sees in `text`, in a line.

    Raises:
        ValueError: the text is empty, or there is no finished demo in `output`.
    """
    from ..data import TextRow
    from ..inference import Engine
    from ..models import MTLLM

    if not text.strip():
        raise ValueError("ask: the text is empty")
    folder = Path(output) / "mt_llm"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"ask: no finished demo in {str(output)!r}; run `mtllm demo` first, or name its folder by --output"
        )
    logits = Engine(MTLLM.from_pretrained(folder)).classify([TextRow(text)])[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)[:3]
    return f"{text!r}: " + ", ".join(f"{TOPICS[index]} {100 * shares[index]:.0f} %" for index in best)
