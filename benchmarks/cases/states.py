"""The demo world's shipped models as test material: trained weights, real tokenizers, states that are not noise."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mtllm_fast.data.pack import PackedBatch
from mtllm_fast.data.tokenise import StackTokenizer
from mtllm_fast.miniworld.demo import ASSETS
from mtllm_fast.miniworld.world import World


@cache
def demo_llm() -> Any:
    """The trained Llama of the demo (4 layers, D=128, V=816) on packed rows, fp32."""
    from transformers import AutoModelForCausalLM

    from mtllm_fast.models.llm import PackedLLM

    model = AutoModelForCausalLM.from_pretrained(ASSETS / "llm", dtype=torch.float32)
    return PackedLLM(model.eval().requires_grad_(False), causal=True)


@cache
def demo_translator() -> Any:
    """The trained MT model of the demo as a Translator, fp32, on the CPU."""
    from mtllm_fast.evaluation import Translator

    return Translator.from_pretrained(ASSETS / "mt", device="cpu", dtype=torch.float32)


@cache
def demo_tokenizer() -> StackTokenizer:
    """Both tokenizers of the demo, limits 512."""
    from transformers import AutoTokenizer

    return StackTokenizer(*(AutoTokenizer.from_pretrained(ASSETS / name) for name in ("mt", "llm")))


def foreign_texts(code: str, count: int) -> list[str]:
    """Different texts in a language of the demo world, one or two sentences each, in random order."""
    found = dict.fromkeys(foreign for foreign, _ in World(seed=1).parallel(code))
    texts = list(found)[:count]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[i] for i in order]


@cache
@torch.no_grad()
def demo_states(rows: int, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(student (T, D), teacher (T, D), head (V, D)) in fp32: last hidden states of the demo's LLM on its own documents,
    the student's from input embeddings with `noise` times their standard deviation added (1.0: a KL of about 0.1)."""
    llm, tokenizer = demo_llm(), demo_tokenizer()
    ids: list[list[int]] = []
    documents = World(seed=1).documents(rows)  # at least one token each
    while sum(map(len, ids)) < rows:
        ids.append(tokenizer.llm(next(documents), add_special_tokens=True)["input_ids"])
    batch = PackedBatch.from_sequences(ids)
    table = llm.model.get_input_embeddings()
    embeds = table(batch.input_ids)
    generator = torch.Generator().manual_seed(0)
    moved = embeds + noise * embeds.std() * torch.randn(embeds.shape, generator=generator)
    student, teacher = llm(batch, embeds=moved), llm(batch)
    return student[:rows].clone(), teacher[:rows].clone(), llm.lm_head.weight.detach().clone()
