"""How likely a model is to write each of some texts after a row: ours, which reads what stands before them once.

    python -m benchmarks.cases.label_likelihood --device cpu

A Llama with random weights reads texts of random words, and a few candidates after each: labels of a word, or the
choices of a question. The same weights and dtype everywhere, tokenisation included:

    ours     inference.likelihood.log_likelihoods
    whole    the same packed model, every candidate behind its own copy of the text
    padded   Hugging Face's model on padded batches of such copies, logits of all positions
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mtllm_fast.kernels import linear_ce
from torch import Tensor

from mtllm_fast.data.batch import tokenise_rows
from mtllm_fast.data.pack import consecutive_packs
from mtllm_fast.data.prompt import Prompt, Writing, target_ids
from mtllm_fast.data.read import TextRow
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.inference.engine import default_budget
from mtllm_fast.inference.likelihood import log_likelihoods
from mtllm_fast.models import MTLLM
from mtllm_fast.models.inputs import read_with_targets
from tests.tiny import llm_tokenizer

from ..models import llama
from ..registry import Case, Variant, Work, register
from ..run import main

BATCH = 32
PROMPT = Prompt(after="\nAnswer:")


@dataclass
class Problem:
    """Texts, what may be written after each, our model, and its weights as Hugging Face's module."""

    rows: list[TextRow]
    candidates: list[list[str]]
    model: MTLLM
    plain: Any


def make(
    rows: int, words: int, candidates: int, answer: int, width: int, layers: int, *, dtype: torch.dtype, device: str
) -> Problem:
    """Texts of about `words` random words, each with so many candidates of `answer` words."""
    from transformers import LlamaForCausalLM

    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    known = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(1500)]
    texts = [" ".join(rng.choices(known, k=max(2, round(rng.gauss(words, words / 4))))) for _ in range(rows)]
    of_rows = [[" ".join(rng.choices(known, k=answer)) for _ in range(candidates)] for _ in texts]
    tokenizer = llm_tokenizer([*texts, *known], vocab_size=4000)
    torch.manual_seed(0)
    config = llama(width, layers, width * 11 // 4, len(tokenizer), width // 64, max_position_embeddings=4096)
    llm = LlamaForCausalLM(config).to(device, dtype).eval()
    plain_config = type(config)(**config.to_dict())
    plain_config._attn_implementation = "sdpa"
    plain = LlamaForCausalLM(plain_config).to(device, dtype).eval()
    plain.load_state_dict(llm.state_dict())
    model = MTLLM.stack(llm=llm, reader="llm", causal=True, tokenizer=StackTokenizer(None, tokenizer))
    return Problem([TextRow(text) for text in texts], of_rows, model.to(device).eval(), plain)


def result(values: Sequence[Any]) -> dict[str, Tensor]:
    return {"log_likelihoods": torch.stack([torch.as_tensor(one, dtype=torch.float64) for one in values])}


def ours(p: Problem) -> dict[str, Tensor]:
    return result(log_likelihoods(p.model, p.rows, p.candidates, PROMPT)[0])


@torch.no_grad()
def whole(p: Problem) -> dict[str, Tensor]:
    """Packed, longest first, one sequence per candidate."""
    written = [replace(row, target=text) for row, texts in zip(p.rows, p.candidates, strict=True) for text in texts]
    tokens = tokenise_rows(written, p.model.require_tokenizer(), ("llm",), Writing(PROMPT))
    costs = [(max(cost),) for cost in tokens.costs()]
    order = sorted(range(len(written)), key=lambda index: (-costs[index][0], index))
    found, head = torch.zeros(len(written), dtype=torch.float64), p.model.require_llm().lm_head
    for pack in consecutive_packs([costs[index] for index in order], default_budget(p.model), even=True):
        members = [order[place] for place in pack]
        batch = tokens.batch(members, align=False).to(p.model.device)
        read, targets = read_with_targets(p.model, batch), batch.targets
        assert targets is not None
        *_, losses = linear_ce(
            read.states, head.weight, targets.input_ids, rows=read.rows, num_valid=targets.num_tokens, per_row=True
        )
        sums = torch.zeros(len(members), dtype=torch.float64, device=losses.device)
        found[members] = -sums.index_add_(0, targets.sequence_ids, losses.double()).cpu()
    return result(list(found.view(len(p.rows), -1)))


def padded(p: Problem, model: Any = None) -> dict[str, Tensor]:
    """Batches of 32 sequences as they come."""
    return result(list(_padded(p, p.plain if model is None else model).view(len(p.rows), -1)))


@torch.no_grad()
def _padded(p: Problem, model: Any) -> Tensor:
    tokenizer = p.model.require_tokenizer()
    before, after, _ = PROMPT.ids(p.rows, tokenizer)
    texts = tokenizer.side("llm", p.rows, ends=False).ids
    sequences, counts = [], []
    for row, (first, text, last) in enumerate(zip(before, texts, after, strict=True)):
        for ids in target_ids(p.candidates[row], tokenizer)[0]:
            sequences.append(torch.tensor([*first, *text[len(tokenizer.llm_prefix) :].tolist(), *last, *ids]))
            counts.append(len(ids))
    found = []
    for start in range(0, len(sequences), BATCH):
        some, device = sequences[start : start + BATCH], next(model.parameters()).device
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True).to(device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in some], batch_first=True).to(device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logs = torch.log_softmax(logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)), -1)
        each = logs.gather(-1, ids[:, 1:, None])[..., 0].double().cpu()
        for row, one, count in zip(each, some, counts[start : start + BATCH], strict=True):
            found.append(row[len(one) - 1 - count : len(one) - 1].sum())
    return torch.stack(found)


def exact(p: Problem) -> dict[str, Tensor]:
    """Hugging Face's model in fp64, one sequence after another."""
    import copy

    return padded(p, copy.deepcopy(p.plain).cpu().double())


def small(p: Problem) -> Problem:
    return Problem(p.rows[:8], p.candidates[:8], p.model, p.plain)


def work(p: Problem) -> Work:
    """The layers on every token once, the head on every row that predicts; weights are read once."""
    tokenizer = p.model.require_tokenizer()
    before, after, _ = PROMPT.ids(p.rows, tokenizer)
    texts = tokenizer.side("llm", p.rows, ends=False).ids
    targets = sum(len(ids) for texts in p.candidates for ids in target_ids(texts, tokenizer)[0])
    read = sum(len(a) + len(b) + len(c) for a, b, c in zip(before, texts, after, strict=True)) + targets
    llm = p.model.require_llm()
    layers = sum(weight.numel() for weight in llm.layers.parameters())
    head = llm.lm_head.weight
    return Work((layers + head.numel()) * head.element_size(), 2.0 * (layers * read + head.numel() * targets))


def sized(label: str, **size: int) -> dict[str, Any]:
    return {"label": label, **size}


register(
    Case(
        name="label_likelihood",
        about="log-likelihoods of labels or choices after texts, forward",
        make=make,
        sizes={
            "quick": (sized("quick", rows=8, words=20, candidates=3, answer=1, width=128, layers=2),),
            "cpu": (
                sized("3 labels", rows=64, words=30, candidates=3, answer=1, width=512, layers=4),
                sized("4 choices", rows=16, words=120, candidates=4, answer=8, width=512, layers=4),
            ),
            "cuda": (
                sized("3 labels", rows=1024, words=30, candidates=3, answer=1, width=2048, layers=16),
                sized("4 choices", rows=512, words=250, candidates=4, answer=12, width=2048, layers=16),
            ),
        },
        variants={
            "ours": Variant(ours, ours=True),
            "whole": Variant(whole),
            "padded": Variant(padded),
        },
        reference=exact,
        small=small,
        work=work,
        tolerance={"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2},
        shape=lambda p: {"N": len(p.rows), "C": len(p.candidates[0]), "D": p.model.hidden_size},
        warm={"rows": 4, "words": 8, "candidates": 2, "answer": 1, "width": 64, "layers": 1},
        sources=("kernels/linear_ce*.py", "kernels/linear_kl*.py", "mtllm_fast/inference/likelihood.py"),
    )
)


if __name__ == "__main__":
    sys.exit(main(cases=("label_likelihood",), prog="benchmarks.cases.label_likelihood"))
