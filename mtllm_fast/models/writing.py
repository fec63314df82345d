"""What a model writes after a row of text: greedily, or sampled by random numbers of each row's own.

    [BOS] before <text> after  ->  answer [EOS]

`<text>` is read by the encoder of a stack (see `inputs`), or as the LLM's own tokens by an LLM alone. Decoding is
plain: the LLM's distribution as it is, whatever settings of generation its folder holds. A token is sampled by
inverting the cumulative distribution at a number in [0, 1) that the caller gives, so that neither the rows beside it
nor their order change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..data.pack import PackedBatch, consecutive_packs
from ..data.prompt import Prompt
from ..data.read import TextRow
from .generate import cached_attention, end_tokens, left_padded, pad_token
from .inputs import compose
from .llm import forget_lengths
from .modes import evaluating
from .readers import EncoderReader, StackReader

if TYPE_CHECKING:
    from ..data.tokenise import StackTokenizer
    from .llm import PackedLLM
    from .mtllm import MTLLM


@dataclass(frozen=True)
class Written:
    """An answer: token ids, with the end token where it has one.

    Fields:
        score: mean log probability of the ids at temperature 1.
        finished: it ends by itself, and not at the length limit.
    """

    ids: list[int]
    score: float
    finished: bool


@dataclass(frozen=True, eq=False)
class Prompts:
    """N rows as a model reads them before it writes.

    Fields:
        text: per row the tokens of the text, of the encoder or of the LLM; before, after: LLM tokens around it.
        lengths: (N,) positions that the LLM reads of each.
        truncated: rows whose text was cut, for the encoder or within the prompt; at least so many where both are cut.
    """

    text: list[NDArray[np.int64]]
    before: list[list[int]]
    after: list[list[int]]
    lengths: NDArray[np.int64]
    truncated: int

    @classmethod
    def of(cls, model: MTLLM, rows: Sequence[TextRow], prompt: Prompt) -> Prompts:
        """Raises ValueError for an unknown language, or a row that a template does not fit."""
        tokenizer, reader = check_writer(model), model.reader
        side = tokenizer.side(reader.side, rows, ends=False)
        before, after, cut = prompt.ids(rows, tokenizer)
        text, more = side.ids, 0
        if isinstance(reader, StackReader):
            more = int(reader.projection.boundary is not None)
        else:  # BOS stands before the prompt
            text = [ids[len(tokenizer.llm_prefix) :] for ids in text]
        lengths = [len(a) + len(b) + len(c) + more for a, b, c in zip(before, text, after, strict=True)]
        return cls(text, before, after, np.array(lengths, np.int64), max(side.truncated, cut))

    def inputs(self, model: MTLLM, index: Sequence[int]) -> list[Tensor]:
        """What the LLM reads of some rows: embeddings (L, D) of a stack, token ids (L,) of an LLM alone."""
        reader = model.reader
        if not isinstance(reader, StackReader):
            whole = [np.concatenate([self.before[i], self.text[i], self.after[i]]).astype(np.int64) for i in index]
            return [torch.from_numpy(ids).to(model.device) for ids in whole]

        def packed(ids: Sequence[Sequence[int] | NDArray[np.int64]]) -> PackedBatch:
            return PackedBatch.from_sequences([ids[i] for i in index]).to(model.device)

        read = compose(reader, packed(self.text), packed(self.before), packed(self.after))
        return list(read.embeds.split(read.batch.lengths))


def check_writer(model: MTLLM) -> StackTokenizer:
    """The tokenizer of a model that can write. Raises ValueError where it cannot."""
    if isinstance(model.reader, EncoderReader):
        raise ValueError("model: reader='encoder' has no LLM that could write")
    if not model.require_llm().causal:
        raise ValueError("model: its LLM is bidirectional; writing needs a causal one (stacked with causal=True)")
    tokenizer = model.require_tokenizer()
    if tokenizer.llm is None:
        raise ValueError("model: has no tokenizer of its LLM")
    return tokenizer


def ends_of(model: MTLLM) -> set[int]:
    """The tokens that end an answer: those of the LLM's generation settings, and its tokenizer's.

    Raises:
        ValueError: there are none, so that nothing would ever end.
    """
    ends = end_tokens(model.require_llm().model.generation_config.eos_token_id)
    own = model.require_tokenizer().llm.eos_token_id
    ends |= set() if own is None else {own}
    if not ends:
        raise ValueError("llm: its tokenizer has no eos_token, so nothing says where an answer ends; set one")
    return ends


@torch.no_grad()
def write(
    model: MTLLM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    max_tokens: int,
    temperature: float = 0.0,
    uniforms: NDArray[np.float64] | None = None,  # (N, K, max_new_tokens)
) -> list[list[Written]]:
    """K answers to each of N rows; one where they are greedy.

    Args:
        max_new_tokens: most tokens of an answer, its end token with them.
        max_tokens: most tokens of one batch, padding and new ones with them; a row that has more stands alone.
        temperature: the logits are divided by it for sampling.
        uniforms: numbers in [0, 1), one per token that is to be sampled; None for greedy decoding.

    Raises:
        ValueError: a row without tokens, one that leaves no room for an answer, or logits that are not finite.
    """
    llm, ends = model.require_llm(), ends_of(model)
    copies = 1 if uniforms is None else uniforms.shape[1]
    _check_lengths(llm, prompts.lengths, max_new_tokens)
    order = sorted(range(len(prompts.text)), key=lambda row: (-prompts.lengths[row], row))
    places = [(row, copy) for row in order for copy in range(copies)]
    costs = [(int(prompts.lengths[row]) + max_new_tokens,) for row, _ in places]
    # beyond the limit of scaled positions a row would change the others of its batch
    limit = llm.length_limit
    kinds = [place + 1 if limit and cost > limit[0] else 0 for place, (cost,) in enumerate(costs)]
    answers: list[list[Written]] = [[] for _ in prompts.text]
    with evaluating(model), cached_attention(llm) as bare:
        before = bare.generation_config
        pad = pad_token(model, ends)
        bare.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=pad
        )
        try:
            for pack in consecutive_packs(costs, max_tokens, padded=True, kinds=kinds):
                chosen = [places[k] for k in pack]
                rows = list(dict.fromkeys(row for row, _ in chosen))
                read = dict(zip(rows, prompts.inputs(model, rows), strict=True))
                forget_lengths(llm.decoder)  # of the batch before
                numbers = None if uniforms is None else np.stack([uniforms[row, copy] for row, copy in chosen])
                found = _generate(bare, [read[row] for row, _ in chosen], temperature, numbers, ends)
                for (row, _), answer in zip(chosen, found, strict=True):
                    answers[row].append(answer)
        finally:
            bare.generation_config = before
    return answers


class _Chooser(LogitsProcessor):
    """Leaves one token of every row to choose from, and notes its log probability."""

    def __init__(self, temperature: float, uniforms: Tensor | None) -> None:
        self.temperature, self.uniforms = temperature, uniforms
        self.logs: list[Tensor] = []  # per token (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.uniforms is None:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            mass = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
            level = self.uniforms[:, len(self.logs), None] * mass[:, -1:]
            # the first token that takes the mass above the level: never one of probability 0
            chosen = torch.searchsorted(mass, level, right=True).clamp_max(scores.shape[-1] - 1)
        self.logs.append(scores.gather(-1, chosen).squeeze(-1) - scores.logsumexp(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


def _generate(
    bare: Any,
    inputs: list[Tensor],
    temperature: float,
    uniforms: NDArray[np.float64] | None,
    ends: set[int],
) -> list[Written]:
    """Answers to the prompts of one batch, by transformers' generate."""
    padded, mask = left_padded(inputs)
    numbers = None if uniforms is None else torch.from_numpy(uniforms).to(padded.device)
    chooser = _Chooser(temperature, numbers)
    ids = padded.dtype == torch.int64
    output = bare.generate(
        **{"input_ids" if ids else "inputs_embeds": padded},
        attention_mask=mask,
        logits_processor=LogitsProcessorList([chooser]),
    )
    written = output[:, padded.shape[1] :] if ids else output
    logs = torch.stack(chooser.logs, 1).tolist()
    answers = []
    for tokens, values in zip(written.tolist(), logs, strict=True):
        end = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
        found, scored = tokens[:end], values[:end]
        score = sum(scored) / len(scored)
        if not np.isfinite(score):
            raise ValueError("model: gives NaN or infinite numbers for what it writes; is its dtype wide enough?")
        answers.append(Written(found, score, end is not None))
    return answers


def _check_lengths(llm: PackedLLM, lengths: NDArray[np.int64], new: int) -> None:
    if len(lengths) and lengths.min() == 0:
        raise ValueError(f"rows[{int(lengths.argmin())}]: neither its text nor the prompt has a token to read")
    positions = getattr(llm.model.config.get_text_config(), "max_position_embeddings", None)
    if llm.length_limit is None and positions and len(lengths) and lengths.max() + new > positions:
        raise ValueError(
            f"max_new_tokens={new}: behind a prompt of {lengths.max()} tokens that is more than the {positions} "
            "positions of the LLM; ask for fewer, or cut the texts (max_length)"
        )
