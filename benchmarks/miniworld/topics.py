"""Texts of several clauses about the kind that most of their things share: a task for which a whole text must be read.

The world's MT model has only met parallel texts of one and two clauses, as real MT models are trained on sentences.
Training and test texts here are longer, as real tasks have documents.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mtllm_fast.miniworld.languages import Clause
from mtllm_fast.miniworld.world import INTRANSITIVE, World, free_english

Text = tuple[Clause, ...]


def topic_task(world: World, split: str, count: int, lengths: Sequence[int]) -> list[tuple[Text, int]]:
    """`count` (text, index into `world.categories`): of what kind are more than half of the things told of?

    A text of n clauses tells of n // 2 + 1 things of its kind, and of others of any other kind, in any order. The nouns
    are those of the split in `world.kind_task`, so a test text's nouns are in no labelled text of training.

    Args:
        split: "train", "validation" or "test". lengths: numbers of clauses, equally frequent.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be train, validation or test, got {split!r}")
    rng = world._rng(f"topics {split} {','.join(map(str, lengths))}")
    nouns = [noun for noun in world.leaves if world.noun_split[noun] == split]
    rows = [_row(world, rng, nouns, lengths[i % len(lengths)]) for i in range(count)]
    rng.shuffle(rows)
    return rows


def unlabelled_topics(world: World, count: int, lengths: Sequence[int]) -> Iterator[str]:
    """English texts of this form for stage 3, about all nouns, in the free English of `world.unlabelled`.

    Half of them have no topic, so that every thing of a text must be read.
    """
    rng = world._rng("unlabelled topics")
    for index in range(count):
        length = lengths[index % len(lengths)]
        if rng.random() < 0.5:
            text, _ = _row(world, rng, world.leaves, length)
        else:
            text = _text(world, rng, rng.choices(world.leaves, k=length))
        yield " ".join(free_english(clause, rng) for clause in text)


def plain_texts(world: World, count: int, lengths: Sequence[int]) -> Iterator[str]:
    """English texts of plain clauses for stage 1, as long as those of the task."""
    from mtllm_fast.miniworld.languages import english

    rng = world._rng("plain texts")
    for index in range(count):
        yield " ".join(english(world.clause(rng)) for _ in range(lengths[index % len(lengths)]))


def say(world: World, code: str, text: Text) -> str:
    return " ".join(world.render(code, clause) for clause in text)


def _row(world: World, rng: random.Random, nouns: Sequence[str], length: int) -> tuple[Text, int]:
    category = rng.choice(world.categories)
    ours = [noun for noun in nouns if world.kinds[noun][0] == category]
    others = [noun for noun in nouns if world.kinds[noun][0] != category]
    most = length // 2 + 1
    chosen = [*rng.choices(ours, k=most), *rng.choices(others, k=length - most)]
    rng.shuffle(chosen)
    return _text(world, rng, chosen), world.categories.index(category)


def _text(world: World, rng: random.Random, nouns: Sequence[str]) -> Text:
    frames = (replace(world._any_clause(rng), adjective=None, object=None) for _ in nouns)
    return tuple(replace(frame, subjects=(noun,), verb=rng.choice(INTRANSITIVE)) for frame, noun in zip(frames, nouns))
