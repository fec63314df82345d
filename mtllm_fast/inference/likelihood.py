"""How likely a model is to write given texts after a row: multiple choice and label words, without logits in memory.

    log p(candidate | text) = sum over its tokens, and the end token, of log p(token | prompt, text, tokens before)

What stands before the candidates of a row is read once (`attention.Branches`); `linear_ce` gives the loss of every
target token from the states before it. Sums are not divided by lengths: with the end token they are probabilities of
whole answers, which is what a model trained on such answers (`mtllm sft`) has learned to tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.pack import PackedBatch, consecutive_packs
from ..data.prompt import Prompt, target_ids
from ..data.read import TextRow
from ..kernels import linear_ce
from ..models import MTLLM
from ..models.attention import Branches
from ..models.modes import evaluating
from ..models.writing import Prompts, check_writer
from .engine import Engine, default_budget

_COPIES = 4  # a budget of tokens holds so many times as many copies of them, which attention alone has


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
    if not rows:
        return [], 0
    prompts = Prompts.of(model, rows, prompt)
    flat = iter(target_ids([text for texts in candidates for text in texts], tokenizer)[0])
    targets = [[next(flat) for _ in texts] for texts in candidates]
    more = [[len(ids) - 1 for ids in of_row] for of_row in targets]  # the last one of each is not read
    lengths = prompts.lengths.tolist()
    costs = [max(n + sum(own), -(-(n * len(own) + sum(own)) // _COPIES)) for n, own in zip(lengths, more, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: (-costs[index], index))
    found = [np.zeros(len(texts)) for texts in candidates]
    head, device, llm = model.require_llm().lm_head, model.device, model.require_llm()
    with evaluating(model):
        for pack in consecutive_packs(
            [(costs[index],) for index in order], max_tokens or default_budget(model), even=True
        ):
            members = [order[place] for place in pack]
            branches, places = branched([lengths[i] for i in members], [more[i] for i in members])
            ids = PackedBatch.from_sequences([one for i in members for one in targets[i]]).to(device)
            batch, embeds = _read(model, prompts, members, [one[:-1] for i in members for one in targets[i]], branches)
            *_, losses = linear_ce(
                llm(batch, embeds=embeds),
                head.weight,
                ids.input_ids,
                bias=head.bias,
                rows=places.to(device),
                num_valid=ids.num_tokens,
                softcap=head.softcap,
                per_row=True,
            )
            sums = torch.zeros(ids.num_sequences, dtype=torch.float64, device=device)
            sums = -sums.index_add_(0, ids.sequence_ids, losses.double()).cpu()
            for i, values in zip(members, sums.split([len(targets[i]) for i in members]), strict=True):
                found[i] = values.numpy()
    if not all(np.isfinite(values).all() for values in found):
        raise ValueError("model: gives NaN or infinite likelihoods; is its dtype wide enough?")
    return found, prompts.truncated


def branched(lengths: Sequence[int], more: Sequence[Sequence[int]]) -> tuple[Branches, Tensor]:
    """How groups of sequences lie that begin alike: each its beginning, then the rest of each of its sequences.

    Args:
        lengths: rows of each beginning, at least one. more: how many rows each sequence has after it.

    Returns:
        the branches, whose ids are 0; and, for each sequence the rows of which the states predict its rest and what
            follows that, end to end.
    """
    rows, slots, places, positions, whole = [], [], [], [], []
    start = copied = 0
    for first, own in zip(lengths, more, strict=True):
        beginning, row = np.arange(start, start + first), start + first
        positions.append(np.arange(first))
        slots.append(copied + np.arange(first))
        for count in own:
            rest = np.arange(row, row + count)
            rows += [beginning, rest]
            places += [beginning[-1:], rest]
            positions.append(first + np.arange(count))
            slots.append(copied + first + np.arange(count))
            whole.append(first + count)
            row, copied = row + count, copied + first + count
        start = row
    joined = [torch.from_numpy(np.concatenate(part)) for part in (rows, slots, places, positions)]
    groups = [first + sum(own) for first, own in zip(lengths, more, strict=True)]
    batch = PackedBatch.from_flat(torch.zeros(start, dtype=torch.int64), groups)
    batch = PackedBatch(batch.input_ids, batch.cu_seqlens, joined[3], batch.lengths)
    copies = PackedBatch.from_flat(torch.zeros(copied, dtype=torch.int64), whole)
    return Branches(batch, copies, joined[0], joined[1]), joined[2]


def _read(
    model: MTLLM, prompts: Prompts, members: Sequence[int], rest: Sequence[Sequence[int]], branches: Branches
) -> tuple[Branches, Tensor | None]:
    """The branches on the model's device with what they read: ids of an LLM alone, or else embeddings (T, D).

    Args:
        rest: ids after the beginnings of all sequences, in their order.
    """
    device, batch = model.device, branches.batch
    firsts = prompts.inputs(model, members)
    ids = torch.tensor([one for some in rest for one in some], dtype=torch.int64, device=device)
    starts = batch.cu_seqlens[:-1].tolist()
    of_first = np.concatenate([start + np.arange(len(first)) for start, first in zip(starts, firsts, strict=True)])
    is_rest = np.ones(batch.num_tokens, np.bool_)
    is_rest[of_first] = False
    places = [torch.from_numpy(rows).to(device) for rows in (of_first, np.flatnonzero(is_rest))]
    embeds = None
    if model.side == "llm":
        read = torch.zeros(batch.num_tokens, dtype=torch.int64, device=device)
        read[places[0]], read[places[1]] = torch.cat(firsts), ids
    else:
        llm = model.require_llm().model
        read = batch.input_ids.to(device)
        embeds = torch.empty(batch.num_tokens, firsts[0].shape[-1], dtype=llm.dtype, device=device)
        embeds[places[0]], embeds[places[1]] = torch.cat(firsts), llm.get_input_embeddings()(ids).to(llm.dtype)
    moved = PackedBatch(read, batch.cu_seqlens.to(device), batch.positions.to(device), batch.lengths)
    whole, rows, slots = branches.whole.to(device), branches.rows.to(device), branches.slots.to(device)
    return Branches(moved, whole, rows, slots), embeds


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
