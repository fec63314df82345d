"""How likely a model is to write given texts after a row: multiple choice and label words, without logits in memory.

    log p(candidate | text) = sum over its tokens, and the end token, of log p(token | prompt, text, tokens before)

The candidates of a row are read one by one, packed with those of other rows; `linear_ce` gives the loss of every target
token from the states before it. Sums are not divided by lengths: with the end token they are probabilities of whole
answers, which is what a model trained on such answers (`mtllm sft`) has learned to tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.batch import tokenise_rows
from ..data.pack import consecutive_packs
from ..data.prompt import Prompt, Writing
from ..data.read import TextRow
from ..kernels import linear_ce
from ..models import MTLLM
from ..models.inputs import read_with_targets
from ..models.modes import evaluating
from ..models.writing import check_writer
from .engine import Engine, default_budget


@torch.no_grad()
def log_likelihoods(
    model: MTLLM,
    rows: Sequence[TextRow],
    candidates: Sequence[Sequence[str]],
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
) -> tuple[list[NDArray[np.float64]], int]:
    """Log-likelihoods (C_i,) of the candidates of each of N rows, and how many rows had their text cut (for
    the encoder or within the prompt, whichever were more).

    Args:
        model: an MTLLM with a causal LLM, reader "stack" or "llm".
        candidates: of each row, at least one.
        max_tokens: budget of one forward pass; None chooses it by device and width.

    Raises:
        ValueError: a model that cannot write, an unknown language, a row that the prompt does not fit, another number
            of lists than of rows, a row without candidates, or likelihoods that are not finite.
    """
    tokenizer = check_writer(model)
    if len(candidates) != len(rows):
        raise ValueError(f"candidates: {len(candidates)} lists for {len(rows)} rows")
    if [] in map(list, candidates):
        raise ValueError(f"candidates[{list(map(list, candidates)).index([])}]: has none")
    written = [replace(row, target=text) for row, texts in zip(rows, candidates, strict=True) for text in texts]
    if not written:
        return [], 0
    tokens = tokenise_rows(written, tokenizer, (model.side,), Writing(prompt))
    costs = [(max(cost),) for cost in tokens.costs()]
    order = sorted(range(len(written)), key=lambda index: (-costs[index][0], index))
    found = np.zeros(len(written))
    head, device = model.require_llm().lm_head, model.device
    with evaluating(model):
        for pack in consecutive_packs(
            [costs[index] for index in order], max_tokens or default_budget(model), even=True
        ):
            members = [order[place] for place in pack]
            batch = tokens.batch(members, align=False).to(device)
            read = read_with_targets(model, batch)
            targets = batch.targets
            assert targets is not None
            *_, losses = linear_ce(
                read.states,
                head.weight,
                targets.input_ids,
                bias=head.bias,
                rows=read.rows,
                num_valid=targets.num_tokens,
                softcap=head.softcap,
                per_row=True,
            )
            sums = torch.zeros(len(members), dtype=torch.float64, device=device)
            found[members] = -sums.index_add_(0, targets.sequence_ids, losses.double()).cpu().numpy()
    if not np.isfinite(found).all():
        raise ValueError("model: gives NaN or infinite likelihoods; is its dtype wide enough?")
    counts = np.cumsum([len(texts) for texts in candidates])
    cut = prompt.ids(rows, tokenizer)[2]
    return np.split(found, counts[:-1]), max(tokenizer.side(model.side, rows, ends=False).truncated, cut)


class Labeller:
    """The log-likelihoods of the same labels after every text. Arguments and errors as in `log_likelihoods`.

    Attributes:
        truncated: texts cut so far.
    """

    def __init__(self, model: MTLLM, prompt: Prompt, labels: Sequence[str], *, max_tokens: int | None = None) -> None:
        check_labels(labels)
        check_writer(model)
        self.model, self.prompt, self.labels = model, prompt, tuple(labels)
        self.max_tokens = max_tokens or default_budget(model)
        self.truncated = 0

    def log_likelihoods(self, rows: Sequence[TextRow]) -> NDArray[np.float64]:
        """(N, C)."""
        found, truncated = log_likelihoods(
            self.model, rows, [self.labels] * len(rows), self.prompt, max_tokens=self.max_tokens
        )
        self.truncated += truncated
        return np.stack(found) if found else np.zeros((0, len(self.labels)))


class HeadLabeller:
    """The log-probabilities of a task head's classes. Attributes as those of `Labeller`; there is no prompt.

    Args:
        labels: the head's own, in the order of the columns.

    Raises:
        ValueError: the model has no head of classes, or one of others.
    """

    prompt = None

    def __init__(self, model: MTLLM, labels: Sequence[str], *, max_tokens: int | None = None) -> None:
        self.engine = Engine(model, max_tokens=max_tokens)
        own = model.config.labels
        if own is None or sorted(own) != sorted(labels):
            has = "no task head of classes" if own is None else f"a task head for {', '.join(own)}"
            raise ValueError(f"labels={list(labels)!r}: the model has {has}")
        self.labels, self.order = tuple(labels), [own.index(label) for label in labels]
        self.max_tokens = self.engine.max_tokens

    @property
    def truncated(self) -> int:
        return self.engine.truncated

    def log_likelihoods(self, rows: Sequence[TextRow]) -> NDArray[np.float64]:
        """(N, C)."""
        logits = torch.from_numpy(self.engine.classify(rows)).double()
        return torch.log_softmax(logits, -1)[:, self.order].numpy()


def check_labels(labels: Sequence[str]) -> None:
    """ValueError unless these are at least two different words."""
    if len(labels) < 2 or len(set(labels)) != len(labels) or not all(label.strip() for label in labels):
        raise ValueError(f"labels={list(labels)!r}: expected at least two different names")
