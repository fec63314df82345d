"""Builds the two models of the world from scratch: tokenizers, an M2M100 translation model, a Llama language model.

`python -m mtllm_fast.miniworld.build --output DIR` writes DIR/mt and DIR/llm, which `from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .languages import ENGLISH
from .parallel import ParallelText, text_contrast, word_contrast
from .world import World

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class BuildConfig:
    """Sizes and lengths of the build. Learning rates are peaks of a linear schedule with 5 % warm-up."""

    mt_width: int = 192
    mt_encoder_layers: int = 2
    mt_decoder_layers: int = 2
    mt_vocabulary: int = 4_500
    mt_steps: int = 1_500
    mt_words_from: float = 0.25
    mt_temperature: float = 0.07
    mt_word_temperature: float = 0.2
    mt_batch: int = 96
    mt_lr: float = 3e-3
    llm_width: int = 128
    llm_layers: int = 4
    llm_vocabulary: int = 1_000
    llm_documents: int = 60_000
    llm_steps: int = 2_000
    llm_batch: int = 80
    llm_lr: float = 3e-3


def train_mt_tokenizer(world: World, vocabulary: int) -> PreTrainedTokenizerFast:
    """One BPE over all languages; unseen characters become bytes. Language codes are special tokens, as in NLLB."""
    texts: list[str] = []
    for code in world.languages:
        pairs = list(world.parallel(code))
        sample = pairs[:3000]
        texts += [foreign for foreign, _ in sample] * max(1, 3000 // len(sample))
    texts += [*world.plain_english(6000, "tokenizer"), *world.open_questions(2000, "tokenizer")]
    codes = [ENGLISH, *world.languages]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    specials = ["<s>", "<pad>", "</s>", "<unk>", *codes]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[*specials, *byte_tokens], show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=codes,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def train_llm_tokenizer(world: World, vocabulary: int, documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on English only: it reads any script, foreign ones byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    # A line starts with the token that a space would give, so that texts read alike alone, in documents and in pairs.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_mt(config: BuildConfig, tokenizer: PreTrainedTokenizerFast) -> M2M100ForConditionalGeneration:
    model = M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=len(tokenizer),
            d_model=config.mt_width,
            encoder_layers=config.mt_encoder_layers,
            decoder_layers=config.mt_decoder_layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=3 * config.mt_width,
            decoder_ffn_dim=3 * config.mt_width,
            max_position_embeddings=512,
            dropout=0.0,
            attention_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            scale_embedding=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config.max_length = 64
    return model


def new_llm(config: BuildConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.llm_width,
            num_hidden_layers=config.llm_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=3 * config.llm_width,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences])


def schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min((step + 1) / warm, max(0.0, (steps - step) / (steps - warm + 1)))


def _train(model: Model, loss_of: Callable[[int], Tensor], steps: int, lr: float, name: str) -> Model:
    """The model after `steps` steps of AdamW on the losses of its batches: number of the step -> loss."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0:
            log.info("%s %d/%d loss %.3f, %.0f s", name, step + 1, steps, loss.item(), time.perf_counter() - start)
    return model.eval()


def train_mt(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    config: BuildConfig,
    *,
    seed: int = 0,
    model: M2M100ForConditionalGeneration | None = None,
) -> M2M100ForConditionalGeneration:
    """Translation loss, and InfoNCE between the mean states of a text and of its translation.

    The contrast makes so small an encoder language-neutral. `model` is trained further, None begins a new one.
    """
    torch.manual_seed(seed)
    model = model or new_mt(config, tokenizer)
    text = ParallelText(world, tokenizer, seed)
    batches = text.batches(config.mt_batch)

    def loss_of(step: int) -> Tensor:
        batch = next(batches)
        rows = len(batch)
        source_ids = pad([row.source for row in batch] + [row.translation for row in batch], tokenizer.pad_token_id)
        mask = (source_ids != tokenizer.pad_token_id).long()
        states = model.get_encoder()(input_ids=source_ids, attention_mask=mask).last_hidden_state
        logits = model(
            encoder_outputs=(states[:rows],),
            attention_mask=mask[:rows],
            decoder_input_ids=pad([[text.eos, *row.labels[:-1]] for row in batch], tokenizer.pad_token_id),
        ).logits
        label_ids = pad([row.labels for row in batch], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), label_ids.flatten(), ignore_index=-100, label_smoothing=0.05)
        # equal meanings would be false negatives of each other
        keep = torch.tensor(list({row.meaning: index for index, row in enumerate(batch)}.values()))
        x, y, x_mask, y_mask = states[:rows], states[rows:], mask[:rows], mask[rows:]
        info = text_contrast(x[keep], x_mask[keep], y[keep], y_mask[keep], config.mt_temperature)
        if step >= config.mt_words_from * config.mt_steps:
            links = torch.tensor([[index, *link] for index, row in enumerate(batch) for link in row.links])
            at, here, there, words = links.T
            info = info + word_contrast(x[at, here], y[at, there], words, config.mt_word_temperature)
        return loss + info

    return _train(model, loss_of, config.mt_steps, config.mt_lr, "mt")


def train_llm(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], config: BuildConfig, *, seed: int = 0
) -> LlamaForCausalLM:
    """Causal language modelling on the world's English."""
    torch.manual_seed(seed)
    model = new_llm(config, tokenizer)
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    ids = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in encoded]
    rng = random.Random(f"{seed}/documents")

    def loss_of(step: int) -> Tensor:
        rows = rng.choices(ids, k=config.llm_batch)
        input_ids = pad(rows, tokenizer.pad_token_id)
        mask = torch.tensor([[1] * len(row) + [0] * (input_ids.shape[1] - len(row)) for row in rows])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        labels = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())

    return _train(model, loss_of, config.llm_steps, config.llm_lr, "llm")


def build(
    world: World, output: str | Path, *, seed: int = 0, config: BuildConfig | None = None, half: bool = False
) -> dict[str, float]:
    """Train both models on the world and write `output`/mt and `output`/llm, tokenizers included.

    Args:
        half: store the weights in float16, for shipping.

    Returns:
        Seconds of each training.
    """
    config = config or BuildConfig()
    output = Path(output)
    seconds = {}
    start = time.perf_counter()
    tokenizer = train_mt_tokenizer(world, config.mt_vocabulary)
    mt = train_mt(world, tokenizer, config, seed=seed)
    _save(mt, tokenizer, output / "mt", half)
    seconds["mt"] = time.perf_counter() - start
    start = time.perf_counter()
    documents = list(world.documents(config.llm_documents))
    tokenizer = train_llm_tokenizer(world, config.llm_vocabulary, documents)
    llm = train_llm(tokenizer, documents, config, seed=seed)
    _save(llm, tokenizer, output / "llm", half)
    seconds["llm"] = time.perf_counter() - start
    return seconds


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, half: bool) -> None:
    (model.half() if half else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mtllm_fast.miniworld.build", description="Train the world's two models."
    )
    parser.add_argument("--output", required=True, help="folder that mt/ and llm/ are written to")
    parser.add_argument("--seed", type=int, default=0, help="of the world, of the first weights and of the batches")
    parser.add_argument("--float32", action="store_true", help="store full precision; the shipped weights are float16")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    seconds = build(World(seed=arguments.seed), arguments.output, seed=arguments.seed, half=not arguments.float32)
    log.info("seconds: %s", seconds)


if __name__ == "__main__":
    main()
