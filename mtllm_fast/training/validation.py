"""Scores on English validation rows, by which the best checkpoint is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from ..data.language import ENGLISH_CODES
from ..data.read import TextRow
from ..models import MTLLM
from .automatic import settled
from .config import OptimSettings
from .stage import Validate


def validation(
    student: MTLLM, rows: Sequence[TextRow], optim: OptimSettings, labels: Sequence[str] | None = None
) -> Validate | None:
    """A function that scores the student on labelled English rows: accuracy, and mean cross-entropy to settle ties.

    It runs with the token budget and the autocast of training. None where there are no rows.

    Args:
        labels: of a student that writes their names, or a row's choices: the likeliest counts; None for a task head.

    Raises:
        ValueError: a row has no label or is not English: the best checkpoint is chosen in English alone.
    """
    optim = settled(optim)
    for index, row in enumerate(rows):
        if row.label is None:
            raise ValueError(f"valid_rows[{index}] has no label: the best checkpoint is chosen by accuracy")
        if row.language is not None and row.language.strip("_") not in ENGLISH_CODES:
            raise ValueError(f"valid_rows[{index}] is {row.language}: the best checkpoint is chosen on English alone")

    def score() -> dict[str, float]:
        # training's one import from a room to its right: scores are those that the finished model will have
        from ..inference import Engine
        from ..inference.likelihood import log_likelihoods

        device = student.device.type
        with torch.autocast(device, torch.bfloat16, enabled=optim.bf16):
            if labels is None:
                logits = torch.from_numpy(Engine(student, max_tokens=optim.tokens).classify(rows))
            else:
                prompt = student.config.prompt
                assert prompt is not None
                candidates = [row.choices or labels for row in rows]
                found, _ = log_likelihoods(student, rows, candidates, prompt, max_tokens=optim.tokens)
                of_rows = [torch.from_numpy(one) for one in found]  # rows may have fewer choices than others
                logits = pad_sequence(of_rows, batch_first=True, padding_value=-torch.inf).float()
        gold = torch.tensor([row.label for row in rows])
        right = (logits.argmax(-1) == gold).float().mean()
        return {"accuracy": float(right), "loss": float(F.cross_entropy(logits, gold))}

    return score if rows else None
