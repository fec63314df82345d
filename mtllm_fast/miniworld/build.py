"""Builds the two models of the world from scratch: tokenizers, an M2M100 translation model, a Llama language model.

`python -m mtllm_fast.miniworld.build --output DIR` writes DIR/mt and DIR/llm, which `from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from .world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildConfig:
    """Sizes and lengths of the build. Learning rates are peaks of a linear schedule with 5 % warm-up."""

    mt_width: int = 192
    mt_encoder_layers: int = 2
    mt_decoder_layers: int = 2
    mt_vocabulary: int = 4_500
    mt_steps: int = 1_500
    mt_contrast_from: float = 0.0
    mt_contrast_weight: float = 1.0
    mt_words_from: float = 0.25
    mt_temperature: float = 0.07
    mt_word_temperature: float = 0.2
    mt_batch: int = 96
    mt_dropout: float = 0.0
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
            dropout=config.mt_dropout,
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


class Example(NamedTuple):
    """Token ids: what the encoder reads, its translation, what the decoder writes; the English as a key.

    `links` are aligned words: last token in the source, last token in the translation, number of the English word.
    """

    source: list[int]
    translation: list[int]
    labels: list[int]
    meaning: tuple[int, ...]
    links: list[tuple[int, int, int]]


class ParallelText:
    """Tokenised parallel text, drawn by language with probability proportional to size ** 0.5, in both directions."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        def encode(texts: Sequence[str]) -> list[list[int]]:
            return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

        vocabulary = tokenizer.get_vocab()
        self.eos = vocabulary["</s>"]
        self.code_id = {code: vocabulary[code] for code in (ENGLISH, *world.languages)}
        self.pairs: dict[str, list[tuple[list[int], list[int], list[tuple[int, int, int]]]]] = {}
        numbers: dict[str, int] = {}
        for code in world.languages:
            foreign, english = zip(*world.parallel(code))
            sides = [tokenizer(list(texts), add_special_tokens=False) for texts in (foreign, english)]
            ends = [[_word_ends(side.word_ids(row)) for row in range(len(foreign))] for side in sides]
            links = align_words([text.split() for text in foreign], [text.split() for text in english])
            self.pairs[code] = [
                (
                    sides[0]["input_ids"][row],
                    sides[1]["input_ids"][row],
                    [
                        (ends[0][row][i], ends[1][row][j], numbers.setdefault(word, len(numbers)))
                        for i, j, word in links[row]
                    ],
                )
                for row in range(len(foreign))
            ]
        self.questions = encode(list(world.open_questions(6000, "questions")))
        self.weights = [len(pairs) ** 0.5 for pairs in self.pairs.values()]
        self.rng = random.Random(f"{seed}/parallel batches")

    def batches(self, size: int, pool: int = 8) -> Iterator[list[Example]]:
        """Endless batches of `size` rows; rows of similar length share a batch."""
        while True:
            rows = sorted(
                (self.example() for _ in range(size * pool)), key=lambda row: (len(row.source), len(row.translation))
            )
            order = list(range(pool))
            self.rng.shuffle(order)
            for index in order:
                yield rows[index * size : (index + 1) * size]

    def example(self) -> Example:
        (code,) = self.rng.choices(list(self.pairs), self.weights)
        foreign, english, links = self.rng.choice(self.pairs[code])
        source_code, source, target_code, target = code, foreign, ENGLISH, english
        direction = self.rng.random()
        if direction >= 0.55:
            source_code, source, target_code, target = ENGLISH, english, code, foreign
            links = [(there, here, word) for here, there, word in links]
        translation = [self.code_id[target_code], *target, self.eos]
        if direction >= 0.75:  # English to English: what the decoder learns first, and then finds in the foreign states
            if self.rng.random() < 0.4:  # forms that only English text has here
                english = self.rng.choice(self.questions)
                source = target = english
                translation, links = [self.code_id[ENGLISH], *english, self.eos], []
            target_code, target = ENGLISH, english
        labels = [self.code_id[target_code], *target, self.eos]
        return Example([self.code_id[source_code], *source, self.eos], translation, labels, tuple(english), links)


def _word_ends(word_ids: Sequence[int | None]) -> list[int]:
    """Position of the last token of each word, counted from the language token."""
    return [
        index + 1 for index, word in enumerate(word_ids) if index + 1 == len(word_ids) or word_ids[index + 1] != word
    ]


def align_words(foreign: Sequence[list[str]], english: Sequence[list[str]]) -> list[list[tuple[int, int, str]]]:
    """Links (foreign place, English place, English word) per text pair, from the pairs alone.

    Two words are linked where each is the other's best by the Dice coefficient of occurring in the same pair; words
    that stand twice in a text are left out.
    """
    count: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    both: Counter[tuple[str, str]] = Counter()
    for left, right in zip(foreign, english):
        count[0].update(set(left))
        count[1].update(set(right))
        both.update((one, other) for one in set(left) for other in set(right))

    def dice(one: str, other: str) -> float:
        return 2 * both[one, other] / (count[0][one] + count[1][other])

    found = []
    for left, right in zip(foreign, english):
        links = []
        for j, other in enumerate(right):
            if right.count(other) > 1 or not left:
                continue
            i = max(range(len(left)), key=lambda place: dice(left[place], other))
            if left.count(left[i]) == 1 and other == max(right, key=lambda word: dice(left[i], word)):
                links.append((i, j, other))
        found.append(links)
    return found


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def text_contrast(x: Tensor, x_mask: Tensor, y: Tensor, y_mask: Tensor, temperature: float) -> Tensor:
    """InfoNCE between the mean states of N texts and of their translations: x (N, L, E), y (N, M, E), masks alike."""
    mean_x, mean_y = F.normalize(pooled(x, x_mask), dim=-1), F.normalize(pooled(y, y_mask), dim=-1)
    return _both_ways(mean_x @ mean_y.T / temperature, torch.arange(len(x)))


def word_contrast(x: Tensor, y: Tensor, words: Tensor, temperature: float) -> Tensor:
    """Draws states x (P, E) of words to the states y (P, E) of the words that they were aligned with.

    A supervised contrast over `words` (P,), word numbers: every place of a word is a positive of every other; plus the
    squared distance of the aligned states over their variance. Mean states alone leave it open at which token a meaning
    stands, and in which directions; a projection that was fitted on English tokens then misreads foreign ones.
    """
    logits = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / temperature
    same = (words[:, None] == words[None]).to(x.dtype)
    loss = torch.zeros(())
    for scores in (logits, logits.T):
        loss = loss - ((same * scores.log_softmax(-1)).sum(-1) / same.sum(-1)).mean() / 2
    return loss + 5 * (x - y).square().sum(-1).mean() / x.detach().var(0).sum()


def _both_ways(logits: Tensor, target: Tensor) -> Tensor:
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_mt(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    config: BuildConfig,
    *,
    seed: int = 0,
    watch: Callable[[int, M2M100ForConditionalGeneration], None] | None = None,
) -> M2M100ForConditionalGeneration:
    """Translation loss; after a warm start also InfoNCE between the mean states of a text and of its translation.

    The contrast makes so small an encoder language-neutral; from the first step on it would collapse.
    """
    torch.manual_seed(seed)
    model = new_mt(config, tokenizer).train()
    text = ParallelText(world, tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.mt_lr, betas=(0.9, 0.98), weight_decay=0.01)
    encoder, start = model.get_encoder(), time.perf_counter()
    batches = text.batches(config.mt_batch)
    for step in range(config.mt_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.mt_lr * schedule(step, config.mt_steps)
        batch = next(batches)
        contrast = step >= config.mt_contrast_from * config.mt_steps
        sources = [row.source for row in batch] + ([row.translation for row in batch] if contrast else [])
        source_ids = pad(sources, tokenizer.pad_token_id)
        mask = (source_ids != tokenizer.pad_token_id).long()
        states = encoder(input_ids=source_ids, attention_mask=mask).last_hidden_state
        rows = len(batch)
        logits = model(
            encoder_outputs=(states[:rows],),
            attention_mask=mask[:rows],
            decoder_input_ids=pad([[text.eos, *row.labels[:-1]] for row in batch], tokenizer.pad_token_id),
        ).logits
        label_ids = pad([row.labels for row in batch], -100)
        loss = F.cross_entropy(logits.flatten(0, 1), label_ids.flatten(), ignore_index=-100, label_smoothing=0.05)
        info = torch.zeros(())
        if contrast:
            # equal meanings would be false negatives of each other
            keep = torch.tensor(list({row.meaning: index for index, row in enumerate(batch)}.values()))
            x, y, x_mask, y_mask = states[:rows], states[rows:], mask[:rows], mask[rows:]
            info = text_contrast(x[keep], x_mask[keep], y[keep], y_mask[keep], config.mt_temperature)
            if step >= config.mt_words_from * config.mt_steps:
                links = torch.tensor([[index, *link] for index, row in enumerate(batch) for link in row.links])
                at, here, there, words = links.T
                info = info + word_contrast(x[at, here], y[at, there], words, config.mt_word_temperature)
        (loss + config.mt_contrast_weight * info).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            log.info(
                "mt %d/%d loss %.3f contrast %.3f, %.0f s",
                step + 1,
                config.mt_steps,
                loss.item(),
                info.item(),
                time.perf_counter() - start,
            )
            if watch:
                watch(step + 1, model)
                model.train()
    return model.eval()


def train_llm(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], config: BuildConfig, *, seed: int = 0
) -> LlamaForCausalLM:
    """Causal language modelling on the world's English."""
    torch.manual_seed(seed)
    model = new_llm(config, tokenizer).train()
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    ids = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in encoded]
    rng = random.Random(f"{seed}/documents")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.llm_lr, betas=(0.9, 0.98), weight_decay=0.01)
    start = time.perf_counter()
    for step in range(config.llm_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.llm_lr * schedule(step, config.llm_steps)
        rows = rng.choices(ids, k=config.llm_batch)
        input_ids = pad(rows, tokenizer.pad_token_id)
        mask = torch.tensor([[1] * len(row) + [0] * (input_ids.shape[1] - len(row)) for row in rows])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        labels = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 250 == 0:
            log.info(
                "llm %d/%d loss %.3f, %.0f s", step + 1, config.llm_steps, loss.item(), time.perf_counter() - start
            )
    return model.eval()


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
