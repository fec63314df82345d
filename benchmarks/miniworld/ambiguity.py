"""Words with two senses, and texts on one topic, in which a reader can tell the sense from the other words.

In a plain world every word has one meaning, so that translation loses nothing. Here each language also has, for pairs
of nouns of different kinds, a word that means either, as well as the two words of before. Parallel text uses it in half
of the clauses and says nothing of topics, so no MT model trained on it can tell the sense: its decoder must choose one,
its encoder need not. The topic task asks for the kind that all three things of a text share.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mtllm_fast.miniworld.languages import ENGLISH, Clause, english
from mtllm_fast.miniworld.world import INTRANSITIVE, World, free_english

Text = tuple[Clause, ...]


@dataclass(frozen=True)
class AmbiguousWorld(World):
    """The world of a seed, its languages enriched by words with two senses; English and the taxonomy are the same."""

    @cached_property
    def test_nouns(self) -> tuple[str, ...]:
        return tuple(noun for noun in self.leaves if self.noun_split[noun] == "test")

    @cached_property
    def two_senses(self) -> dict[str, dict[str, str]]:
        """Language -> test noun -> the word that means this noun or one of another kind."""
        found: dict[str, dict[str, str]] = {}
        for code, language in self.languages.items():
            rng = self._rng(f"two senses {code}")
            words = sorted(language.words.values())
            taken, found[code] = set(words), {}
            for pair in self._pairs(rng):
                word = ""
                while not word or word in taken:
                    head, tail = rng.sample(words, 2)
                    word = head[: (len(head) + 1) // 2] + tail[len(tail) // 2 :]
                taken.add(word)
                found[code].update(dict.fromkeys(pair, word))
        return found

    def _pairs(self, rng: random.Random) -> list[tuple[str, str]]:
        nouns = list(self.test_nouns)
        while True:
            rng.shuffle(nouns)
            pairs = list(zip(nouns[::2], nouns[1::2]))
            if all(self.kinds[one][0] != self.kinds[other][0] for one, other in pairs):
                return pairs

    def parallel(self, code: str) -> Iterator[tuple[str, str]]:
        """As in `World`; half of the subjects are test nouns, and half of the clauses use the words with two senses."""
        language = self._language(code)
        double = replace(language, words={**language.words, **self.two_senses[code]})
        rng = self._rng(f"parallel with two senses {code}")
        for _ in range(self.high if language.resources == "high" else self.low):
            kind = rng.random()
            clauses = [self._clause_of_test_nouns(rng) for _ in range(2 if kind < 0.2 else 1)]
            if kind >= 0.7:
                clauses = [replace(clauses[0], verb=None)]
            foreign = [(double if rng.random() < 0.5 else language).render(clause) for clause in clauses]
            yield " ".join(foreign), " ".join(map(english, clauses))

    def _clause_of_test_nouns(self, rng: random.Random) -> Clause:
        clause = self.clause(rng)
        if rng.random() < 0.5:
            return clause
        return replace(clause, subjects=tuple(rng.sample(self.test_nouns, len(clause.subjects))))

    def topic_task(self, split: str, count: int) -> list[tuple[Text, int]]:
        """`count` (text of two clauses about three things of one kind, index of the kind into `categories`).

        The nouns are those of the split, as in `kind_task`: a test text's nouns are in no labelled text of training.
        """
        rng = self._rng(f"topics {split}")
        rows: dict[Text, int] = {}
        while len(rows) < count:
            index = len(rows) % len(self.categories)
            nouns = [n for n in self.leaves if self.kinds[n][0] == self.categories[index] and self._in(n, split)]
            rows[self._text(rng, rng.choices(nouns, k=3) if len(nouns) < 3 else rng.sample(nouns, 3))] = index
        shuffled = list(rows.items())
        rng.shuffle(shuffled)
        return shuffled

    def _in(self, noun: str, split: str) -> bool:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split must be train, validation or test, got {split!r}")
        return self.noun_split[noun] == split

    def _text(self, rng: random.Random, nouns: list[str]) -> Text:
        frames = [
            replace(self._any_clause(rng), adjective=None, object=None, verb=rng.choice(INTRANSITIVE)) for _ in "12"
        ]
        first = replace(frames[0], subjects=tuple(nouns[:2]), conjunction="and")
        second = replace(frames[1], subjects=(nouns[2],))
        return (first, second) if rng.random() < 0.5 else (second, first)

    def unlabelled_topics(self, count: int) -> Iterator[str]:
        """English of the same form about all nouns for stage 3, in free English; half of the texts have no topic.

        Texts without a topic are there so that every noun of a text must be read, not any one of them.
        """
        rng = self._rng("unlabelled topics")
        for _ in range(count):
            nouns = rng.sample(self.leaves, 3)
            if rng.random() < 0.5:
                category = rng.choice(self.categories)
                nouns = rng.sample([noun for noun in self.leaves if self.kinds[noun][0] == category], 3)
            yield " ".join(free_english(clause, rng) for clause in self._text(rng, nouns))

    def say(self, code: str, text: Text, ambiguous: Collection[str] = ()) -> str:
        """The text in a language, with the word with two senses for every noun of `ambiguous`."""
        if code == ENGLISH:
            return " ".join(map(english, text))
        language = self._language(code)
        senses = {noun: self.two_senses[code][noun] for noun in ambiguous}
        speaker = replace(language, words={**language.words, **senses}) if senses else language
        return " ".join(map(speaker.render, text))


def learn_two_senses(world: AmbiguousWorld, mt: str | Path, output: str | Path, *, steps: int) -> None:
    """Train the MT model in the folder `mt` further, on the world's parallel text, and write it to `output`."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from mtllm_fast.miniworld.build import BuildConfig, train_mt

    tokenizer: Any = AutoTokenizer.from_pretrained(str(mt))
    config = BuildConfig(mt_steps=steps, mt_lr=1e-3, mt_words_from=0.0)
    model = train_mt(world, tokenizer, config, model=AutoModelForSeq2SeqLM.from_pretrained(str(mt)))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
