"""Parallel text as the world's MT model is trained on it, and the losses that make its encoder language-neutral."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .languages import ENGLISH
from .world import World


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
        questions = list(world.open_questions(6000, "questions"))
        self.questions = tokenizer(questions, add_special_tokens=False)["input_ids"]
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
    logits, target = mean_x @ mean_y.T / temperature, torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


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
