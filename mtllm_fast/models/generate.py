"""Text generation behind the encoder: the projected states of a text are soft-prompt input of a causal LLM.

    [BOS]  before  text  after  ->  continuation

`before` and `after` are the LLM's own tokens, `text` is what the MT encoder reads, in any of its languages; see
`inputs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.language import language_read
from ..data.pack import PackedBatch
from ..data.prompt import with_prefix
from ..data.read import TextRow
from ..data.tokenise import StackTokenizer
from .attention import NAME
from .inputs import compose
from .llm import PackedLLM, forget_lengths
from .modes import evaluating
from .readers import StackReader

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .mtllm import MTLLM


def generate(
    model: MTLLM, texts: Sequence[str], languages: str | Sequence[str] | None = None, **options: Any
) -> list[str]:
    """Continuations of N texts, written by the LLM, in their order; arguments and errors of `generate_ids`."""
    ids = generate_ids(model, texts, languages, **options)
    return model.require_tokenizer().llm.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def generate_ids(
    model: MTLLM,
    texts: Sequence[str],
    languages: str | Sequence[str] | None = None,
    *,
    before: str | Sequence[str] = "",
    after: str | Sequence[str] = "",
    bos: bool = True,
    batch_size: int = 16,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> list[list[int]]:
    """The new token ids of continuations of N texts, in their order, without padding and with the end token.

    Args:
        model: reader "stack", causal LLM.
        texts: N texts; languages: one MT code for all, or one per text; encoders with languages need them.
        before, after: prompt in the LLM's own tokens around each text, one for all or one per text. Special tokens
            written in them count as such, so that a chat template can be given here; those in `texts` never do. The
            prompt that a model was taught with is not taken by itself: it is `model.config.prompt`.
        bos: start with the LLM's BOS token, where its tokenizer writes one and `before` does not begin with it.
        batch_size: texts generated together, left-padded to the longest; texts of similar length share a batch.
        generation_config, options: as in `transformers.GenerationMixin.generate` (`max_new_tokens`, `num_beams`, ...).
            With `num_return_sequences` n the result holds n continuations of each text, one after the other.

    Raises:
        ValueError: the model cannot generate, an empty text, an unknown language, or lists of different lengths.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be >= 1")
    with evaluating(model):
        prompts = soft_prompts(model, texts, languages, before=before, after=after, bos=bos, batch_size=batch_size)
        packed_llm = model.require_llm()
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        results: list[list[list[int]]] = [[] for _ in prompts]
        with cached_attention(packed_llm) as llm:
            configs = (generation_config, llm.generation_config)  # transformers fills the gaps of the first likewise
            ends = end_tokens(options.get("eos_token_id", first_set("eos_token_id", configs)))
            if first_set("pad_token_id", configs) is None:
                options.setdefault("pad_token_id", pad_token(model, ends))
            for start in range(0, len(order), batch_size):
                members = order[start : start + batch_size]
                lengths = [len(prompts[index]) for index in members]
                check_lengths(packed_llm, lengths, new_tokens(options, configs, max(lengths)))
                forget_lengths(packed_llm.decoder)  # of the batch before
                embeds, mask = left_padded([prompts[index] for index in members])
                output = llm.generate(
                    inputs_embeds=embeds, attention_mask=mask, generation_config=generation_config, **options
                )
                copies = len(output) // len(members)
                for slot, row in enumerate(output.tolist()):
                    results[members[slot // copies]].append(until_end(row, ends))
    return [ids for group in results for ids in group]


def soft_prompts(
    model: MTLLM,
    texts: Sequence[str],
    languages: str | Sequence[str] | None = None,
    *,
    before: str | Sequence[str] = "",
    after: str | Sequence[str] = "",
    bos: bool = True,
    batch_size: int = 16,
) -> list[Tensor]:
    """What the LLM reads for each text: N input embeddings (L, D) in its dtype. Arguments as in `generate_ids`."""
    stack, tokenizer = check(model)
    if isinstance(texts, str):
        raise TypeError("texts: got one str; pass a list of texts")
    languages = language_read(tokenizer, "mt", languages, "languages")
    codes = [None] * len(texts) if languages is None else per_text("languages", languages, len(texts))
    starts, ends = per_text("before", before, len(texts)), per_text("after", after, len(texts))
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"texts[{index}] is empty")
    device = stack.llm.model.get_input_embeddings().weight.device
    prefix = tokenizer.llm_prefix if bos else []

    def packed(ids: Sequence[Sequence[int] | NDArray[np.int64]]) -> PackedBatch:
        return PackedBatch.from_sequences(ids).to(device)

    prompts: list[Tensor] = []
    for start in range(0, len(texts), batch_size):
        part = slice(start, start + batch_size)
        side = tokenizer.mt_side([TextRow(text, code) for text, code in zip(texts[part], codes[part])], ends=False)
        opening = packed([with_prefix(prefix, tokenizer.llm_ids(text)) for text in starts[part]])
        closing = packed([tokenizer.llm_ids(text) for text in ends[part]])
        inputs = compose(stack, packed(side.ids), opening, closing)
        prompts += inputs.embeds.split(inputs.batch.lengths)
    return prompts


@contextmanager
def cached_attention(llm: PackedLLM) -> Iterator[Any]:
    """The bare transformers model inside the block attends as `generate` needs it (padding mask, KV cache).

    Adapters stay as they are; packed attention is back afterwards.
    """
    # SDPA has no soft-cap of the attention scores (Gemma 2), and transformers 5.17 would leave it out in silence
    capped = getattr(llm.model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    llm.model.set_attn_implementation("sdpa" if llm.model._supports_sdpa and not capped else "eager")
    try:
        yield llm.model
    finally:
        forget_lengths(llm.decoder)
        llm.model.set_attn_implementation(NAME)


def check(model: MTLLM) -> tuple[StackReader, StackTokenizer]:
    """The parts that generation needs. Raises ValueError where `model` cannot generate."""
    stack, tokenizer = model.reader, model.tokenizer
    if not isinstance(stack, StackReader):
        raise ValueError(
            f"model: reader={model.config.reader!r} has no encoder before an LLM; generation needs 'stack'"
        )
    if not stack.llm.causal:
        raise ValueError("model: its LLM is bidirectional; generation needs one stacked with causal=True")
    if tokenizer is None or tokenizer.mt is None or tokenizer.llm is None:
        raise ValueError("model: generation needs the tokenizers of both the encoder and the LLM")
    return stack, tokenizer


def per_text(name: str, value: str | Sequence[str], count: int) -> list[str]:
    """`value` once per text. Raises ValueError where a list has another length."""
    values = [value] * count if isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"{name}: {len(values)} values for {count} texts")
    return values


def check_lengths(llm: PackedLLM, lengths: Sequence[int], new: int) -> None:
    """Raise ValueError where texts generated together would change each other (see `llm.length_limit`)."""
    limit = llm.length_limit
    if limit is not None and len(lengths) > 1 and max(lengths) + new > limit[0]:
        raise ValueError(
            f"batch_size: a prompt of {max(lengths)} tokens and {new} new ones pass {limit[0]}, where {limit[1]!r} "
            "scaling of the positions changes all texts of a batch; pass batch_size=1, or shorter prompts"
        )


def new_tokens(options: Mapping[str, Any], configs: Sequence[GenerationConfig | None], longest: int) -> int:
    """The most new tokens that transformers generates behind a prompt of `longest` embeddings."""
    new, total = (
        first_set(name, configs) if options.get(name) is None else options[name]
        for name in ("max_new_tokens", "max_length")
    )
    if new is not None:
        return int(new)
    return 20 if total is None else max(int(total) - longest, 0)


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (L_i, D) or (L_i,) -> (B, L, D) or (B, L), and mask (B, L) int64, padded with zeros on the left."""
    longest = max(map(len, prompts))
    embeds = prompts[0].new_zeros(len(prompts), longest, *prompts[0].shape[1:])
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=embeds.device)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return embeds, mask


def first_set(name: str, configs: Sequence[GenerationConfig | None]) -> Any:
    """The setting `name` of the first config that has one."""
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def end_tokens(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else set(ids) if isinstance(ids, list | tuple) else {int(ids)}


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to and with the first end token; what follows is padding."""
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def pad_token(model: MTLLM, ends: set[int]) -> int:
    """A token to pad finished rows with, for LLMs that define none."""
    own = model.require_tokenizer().llm.pad_token_id
    return own if own is not None else min(ends, default=0)
