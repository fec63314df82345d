"""Rows with the log-probabilities that a model at hand gives their labels, for `losses.label_kl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..data.batch import tokenise_readable
from ..data.pack import token_budget_packs
from ..data.read import TextRow
from ..models import MTLLM
from ..models.config import MTLLMConfig
from ..models.modes import evaluating
from .task_teacher import check_labels

WINDOW = 4096  # rows tokenised at once


def check_labeller(folder: str, config: MTLLMConfig, labels: Sequence[str]) -> None:
    """Raise ValueError where the model in `folder` has no task head for exactly these labels."""
    own = config.labels
    if own is None:
        kind = "no task head" if config.head is None else "a head that scores choices"
        raise ValueError(f"teacher={folder!r}: has {kind}; loss.label_kl learns from a classifier of the same labels")
    check_labels(folder, own, labels)


@torch.no_grad()
def labelled(
    teacher: MTLLM, rows: Sequence[TextRow], labels: Sequence[str], *, max_tokens: int, bf16: bool
) -> tuple[list[TextRow], int]:
    """The rows with a `soft_label` in the order of `labels`, and how many were left out because the teacher's tokenizer
    fails on them.

    Args:
        teacher: with a classification head, on the device that it is to run on; `check_labeller` accepts it.
        max_tokens: budget of one pass. bf16: run it under bf16 autocast.
    """
    own = teacher.config.labels or []
    order, tokenizer = [own.index(label) for label in labels], teacher.require_tokenizer()
    found: list[TextRow] = []
    for start in range(0, len(rows), WINDOW):
        window = list(rows[start : start + WINDOW])
        tokens, bad = tokenise_readable(window, tokenizer, (teacher.side,))
        if bad:
            window = [row for row in window if not tokenise_readable([row], tokenizer, (teacher.side,))[1]]
        scores = torch.zeros(len(window), len(order), dtype=torch.float64)
        for members in token_budget_packs(tokens.costs(), max_tokens) if window else ():
            batch = tokens.batch(members, align=False).to(teacher.device)
            with torch.autocast(teacher.device.type, torch.bfloat16, enabled=bf16), evaluating(teacher):
                logits = teacher.logits(batch)
            scores[list(members)] = torch.log_softmax(logits.double(), -1)[:, order].cpu()
        if not torch.isfinite(scores).all():
            raise ValueError("teacher: gives labels a probability of NaN or 0; is its dtype wide enough?")
        found += [replace(row, soft_label=tuple(one)) for row, one in zip(window, scores.tolist(), strict=True)]
    return found, len(rows) - len(found)
