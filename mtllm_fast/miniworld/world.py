"""A small generated world: things with a taxonomy, an English that states it, and languages that only translate it.

Everything is a function of one seed. The pieces, and who gets to read them:

* plain clauses ("the old fox followed a drum here"): parallel text for the MT model, English text for the LLM and for
  the adaptation;
* knowledge ("every fox is a mammal", "no bird is a fish"): English only, LLM only. Nouns are drawn uniformly in plain
  clauses, so that which noun is what kind of thing cannot be read off parallel text;
* the kind task, which the demo runs: "the fox waits here near the river" is about a *mammal*, one of twelve
  kinds. Labels are given for half of the nouns; the others' kinds are known from the LLM's English alone;
* an inference task, harder: "the fox or crow waits here" against "a mammal waits here". *Entailment* when both nouns
  are of the kind named, *neutral* when one is, *contradiction* when none is. The three labels are equally frequent,
  and no label
  can be told from word forms or word order: the taxonomy is needed. Pairs (noun, kind) are split into train,
  validation and test, so that no pair that decides a test row occurs in a row of training; so are premises, and no
  premise of validation or test occurs in any other text.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from .languages import ENGLISH, Clause, Language, article, english, english_verb, make_languages

LABELS = ("entailment", "neutral", "contradiction")

TAXONOMY: dict[str, dict[str, str]] = {
    "animal": {
        "mammal": "fox wolf bear horse goat mouse otter deer camel rabbit",
        "bird": "crow eagle owl swan robin heron sparrow pigeon falcon duck",
        "fish": "trout salmon carp pike eel perch herring cod shark tuna",
        "insect": "ant bee wasp moth beetle cricket hornet mantis termite aphid",
    },
    "plant": {
        "tree": "oak pine birch maple willow cedar elm poplar beech larch",
        "flower": "rose tulip lily daisy violet orchid poppy iris lotus dahlia",
        "vegetable": "carrot onion turnip cabbage leek radish spinach garlic celery beet",
        "fruit": "apple pear plum cherry grape lemon melon peach mango fig",
    },
    "artifact": {
        "tool": "hammer saw axe chisel drill wrench shovel rake spade sickle",
        "vehicle": "cart wagon truck bus tram sled bicycle train ferry van",
        "garment": "coat shirt hat glove scarf sock skirt robe boot vest",
        "instrument": "drum flute harp violin piano trumpet guitar cello banjo oboe",
    },
}
INTRANSITIVE = ["wait", "rest", "turn", "stay", "vanish", "appear", "arrive", "burn", "sink", "fall"]
TRANSITIVE = ["follow", "touch", "need", "guard", "carry", "find", "hide", "lift", "reach", "watch"]
ADJECTIVES = ["old", "small", "red", "green", "quiet", "heavy", "bright", "strange", "clean", "broken"]
ADVERBS = ["here", "there", "today", "slowly", "again", "alone", "early", "often"]
PLACES = ["river", "house", "hill", "road", "market", "forest", "garden", "bridge"]
PREPOSITIONS = ["near", "behind", "under"]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One inference example. `pairs` are the (noun, kind) pairs that decide the label."""

    premise: Clause
    hypothesis: Clause
    label: int
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class World:
    """The world of one seed.

    `high` and `low` are the numbers of parallel sentences of a language with much and with little parallel text.
    """

    seed: int = 0
    high: int = 12_000
    low: int = 1_500
    test_share: float = 0.3
    languages: dict[str, Language] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 < self.test_share < 0.8:
            raise ValueError(f"test_share must lie between 0 and 0.8, got {self.test_share}")
        if not self.languages:
            others = (INTRANSITIVE, TRANSITIVE, ADJECTIVES, ADVERBS, PLACES, PREPOSITIONS)
            words = [*self.nouns, *itertools.chain(*others), "and", "or"]
            object.__setattr__(self, "languages", make_languages(words, seed=self.seed))

    @cached_property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Each noun -> what it is a kind of, nearest first. The top kinds map to ()."""
        kinds: dict[str, tuple[str, ...]] = {}
        for top, categories in TAXONOMY.items():
            kinds[top] = ()
            for category, members in categories.items():
                kinds[category] = (top,)
                kinds.update(dict.fromkeys(members.split(), (category, top)))
        return kinds

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        return tuple(noun for noun, kinds in self.kinds.items() if len(kinds) == 2)

    @cached_property
    def categories(self) -> tuple[str, ...]:
        return tuple(noun for noun, kinds in self.kinds.items() if len(kinds) == 1)

    @property
    def nouns(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    @cached_property
    def pair_split(self) -> dict[tuple[str, str], str]:
        """Each (leaf noun, category) -> "train", "validation" or "test".

        Of every category the same shares of its true and of its false pairs are held out.
        """
        rng = self._rng("pairs")
        split: dict[tuple[str, str], str] = {}
        for category in self.categories:
            members = [noun for noun in self.leaves if self.kinds[noun][0] == category]
            strangers = [noun for noun in self.leaves if self.kinds[noun][0] != category]
            for nouns in (members, strangers):
                rng.shuffle(nouns)
                test = round(len(nouns) * self.test_share)
                validation = max(2, round(len(nouns) * 0.1))
                for index, noun in enumerate(nouns):
                    part = "test" if index < test else "validation" if index < test + validation else "train"
                    split[noun, category] = part
        return split

    def clause(self, rng: random.Random) -> Clause:
        """One plain clause, no premise of validation or test; nouns are uniform over leaves and kinds."""
        while True:
            clause = self._any_clause(rng)
            if len(clause.subjects) == 1 or sentence_split(clause) == "train":
                return clause

    def _any_clause(self, rng: random.Random) -> Clause:
        coordinated = rng.random() < 0.4
        subjects = tuple(rng.sample(self.nouns, 2 if coordinated else 1))
        transitive = rng.random() < 0.35
        tail = rng.random()
        return Clause(
            subjects=subjects,
            conjunction=rng.choice(("and", "or")),
            adjective=rng.choice(ADJECTIVES) if not coordinated and rng.random() < 0.4 else None,
            definite=rng.random() < 0.6,
            verb=rng.choice(TRANSITIVE if transitive else INTRANSITIVE),
            past=rng.random() < 0.5,
            object=rng.choice(self.nouns) if transitive else None,
            object_definite=rng.random() < 0.4,
            adverb=rng.choice(ADVERBS) if 0.35 < tail < 0.7 and not transitive else None,
            place=rng.choice(PLACES) if tail >= 0.7 and not transitive else None,
            preposition=rng.choice(PREPOSITIONS),
        )

    def parallel(self, code: str) -> Iterator[tuple[str, str]]:
        """(foreign, English) texts of one language: phrases, clauses, and texts of two clauses (3 : 5 : 2)."""
        language = self._language(code)
        rng = self._rng(f"parallel {code}")
        for _ in range(self.high if language.resources == "high" else self.low):
            kind = rng.random()
            clauses = [self.clause(rng) for _ in range(2 if kind < 0.2 else 1)]
            if kind >= 0.7:
                clauses = [replace(clauses[0], verb=None)]
            yield " ".join(map(language.render, clauses)), " ".join(map(english, clauses))

    def plain_english(self, count: int, name: str = "plain") -> Iterator[str]:
        """English texts of one or two plain clauses, without knowledge."""
        rng = self._rng(name)
        for _ in range(count):
            yield " ".join(english(self.clause(rng)) for _ in range(rng.choice((1, 2))))

    def facts(self) -> list[str]:
        """Every statement of knowledge, in English."""
        facts = []
        for noun, kinds in self.kinds.items():
            a_noun = article(noun)
            for kind in kinds:
                facts += [
                    f"{a_noun} is {article(kind)}",
                    f"every {noun} is {article(kind)}",
                    f"{a_noun} is a kind of {kind}",
                ]
        for level in (tuple(TAXONOMY), self.categories):
            for one, other in itertools.permutations(level, 2):
                facts += [f"no {one} is {article(other)}", f"{article(one)} is not {article(other)}"]
        return facts

    def documents(self, count: int) -> Iterator[str]:
        """The LLM's English, a few lines each: facts, questions, things told of again by their kind, plain clauses."""
        rng = self._rng("documents")
        facts = self.facts()
        members = {kind: [n for n in self.nouns if kind in self.kinds[n]] for kind in self.nouns}
        for _ in range(count):
            style = rng.random()
            if style < 0.2:
                lines = [rng.choice(facts) for _ in range(3)]
            elif style < 0.6:
                lines = [self._question(rng) for _ in range(3)]
            elif style < 0.75:
                noun = rng.choice(self.leaves)
                again = rng.choice((noun, *self.kinds[noun]))
                first = replace(self.clause(rng), subjects=(noun,), definite=False)
                second = replace(self.clause(rng), subjects=(again,), definite=True, adjective=None)
                lines = [english(first), english(second)]
            elif style < 0.8:
                kind = rng.choice(self.categories)
                listed = [article(noun) for noun in rng.sample(members[kind], 4)]
                lines = [f"{', '.join(listed[:3])} and {listed[3]} are all of one kind : {kind}"]
            else:
                lines = [english(self.clause(rng)) for _ in range(rng.choice((1, 2)))]
            yield "\n".join(lines)

    def _question(self, rng: random.Random) -> str:
        """Whether something that is told of is of a kind, and the answer, half of them yes."""
        noun = rng.choice(self.leaves)
        yes = rng.random() < 0.5
        kind = rng.choice(self.kinds[noun] if yes else [k for k in self.categories if k not in self.kinds[noun]])
        return f"{self._ask(rng, noun, kind)} {'yes' if yes else 'no'}"

    def _ask(self, rng: random.Random, noun: str, kind: str) -> str:
        if rng.random() < 0.5:
            return f"is {article(noun)} {article(kind)} ?"
        told = english(replace(self.clause(rng), subjects=(noun,), definite=rng.random() < 0.5))
        return f"{told} . is it {article(kind)} ?"

    def open_questions(self, count: int, name: str) -> Iterator[str]:
        """Questions without answers, about any noun and any kind alike, so that they tell nothing of the taxonomy."""
        rng = self._rng(name)
        for _ in range(count):
            yield self._ask(rng, rng.choice(self.nouns), rng.choice(self.nouns))

    def adaptation_texts(self, count: int) -> Iterator[str]:
        """English for stage 1: plain texts and questions; no answer and no fact is in it."""
        rng = self._rng("adaptation")
        plain = self.plain_english(count, "adapt")
        for _ in range(count):
            if rng.random() < 0.5:
                yield next(plain)
            else:
                yield self._question(rng).rsplit(" ", 1)[0]

    @cached_property
    def noun_split(self) -> dict[str, str]:
        """Each leaf noun -> "train", "validation" or "test" of the kind task: 5, 2 and 3 of ten per category."""
        rng = self._rng("nouns")
        split = {}
        for category in self.categories:
            members = [noun for noun in self.leaves if self.kinds[noun][0] == category]
            rng.shuffle(members)
            split.update(
                {noun: "train" if i < 5 else "validation" if i < 7 else "test" for i, noun in enumerate(members)}
            )
        return split

    def kind_task(self, split: str, count: int) -> list[tuple[Clause, int]]:
        """`count` (clause, index into `categories`): of what kind is the thing that the clause tells of?

        The nouns of a split are its own, so a test row's (noun, kind) is in no labelled row of training. Split
        "unlabelled" has all nouns: what the teacher may label. Clauses have an adverb and a place, which no clause of
        any corpus has.
        """
        if split not in ("train", "validation", "test", "unlabelled"):
            raise ValueError(f"split must be train, validation, test or unlabelled, got {split!r}")
        rng = self._rng(f"kinds {split}")
        nouns = [noun for noun in self.leaves if split in ("unlabelled", self.noun_split[noun])]
        rows: dict[Clause, int] = {}
        while len(rows) < count:
            noun = nouns[len(rows) % len(nouns)]
            frame = replace(self._any_clause(rng), adjective=None, object=None, verb=rng.choice(INTRANSITIVE))
            clause = replace(frame, subjects=(noun,), adverb=rng.choice(ADVERBS), place=rng.choice(PLACES))
            if zlib.crc32(english(replace(clause, subjects=("it",))).encode()) % 4 == (0 if split == "test" else 1):
                rows[clause] = self.categories.index(self.kinds[noun][0])
        shuffled = list(rows.items())
        rng.shuffle(shuffled)
        return shuffled

    def unlabelled(self, count: int) -> Iterator[str]:
        """English for stage 3: clauses of the kind task about all nouns, three in five in free English.

        Free English puts the verb first, second or last, and drops the articles half of the time. Where every text says
        "the fox waits", the stack learns to look behind an article at the start, where most languages have none.
        """
        rng = self._rng("unlabelled texts")
        for clause, _ in self.kind_task("unlabelled", count):
            yield free_english(clause, rng)

    def task(self, split: str, count: int) -> list[TaskRow]:
        """`count` shuffled rows of the inference task, labels equally frequent, decided only by pairs of this split.

        A third of the training rows asks about a top kind (animal, plant, artifact). Without them a noun whose own
        category is held out would only ever be met where it is not of the kind asked for, and that would be learned.
        """
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split must be train, validation or test, got {split!r}")
        rng = self._rng(f"task {split}")
        true: dict[str, list[str]] = {}
        false: dict[str, list[str]] = {}
        for (noun, category), part in self.pair_split.items():
            if part == split:
                (true if category in self.kinds[noun] else false).setdefault(category, []).append(noun)
        for top in TAXONOMY:
            true[top] = [noun for noun in self.leaves if top in self.kinds[noun]]
            false[top] = [noun for noun in self.leaves if top not in self.kinds[noun]]
        rows = []
        for index in range(count):
            label = index % 3
            while True:
                on_top = split == "train" and rng.random() < 1 / 3
                kind = rng.choice(tuple(TAXONOMY) if on_top else self.categories)
                nouns = rng.sample(true[kind], 2 - label) + rng.sample(false[kind], label)
                rng.shuffle(nouns)
                frame = replace(self._any_clause(rng), adjective=None, conjunction="or", object=None)
                frame = replace(frame, verb=rng.choice(INTRANSITIVE))
                premise = replace(frame, subjects=tuple(nouns), definite=True)
                if sentence_split(premise) == split:
                    break
            hypothesis = replace(frame, subjects=(kind,), definite=False)
            rows.append(TaskRow(premise, hypothesis, label, tuple((noun, kind) for noun in nouns)))
        rng.shuffle(rows)
        return rows

    def render(self, code: str, clause: Clause) -> str:
        return english(clause) if code == ENGLISH else self._language(code).render(clause)

    def _language(self, code: str) -> Language:
        if code not in self.languages:
            raise ValueError(f"code must be one of {', '.join(self.languages)}, got {code!r}")
        return self.languages[code]

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}")


def sentence_split(clause: Clause) -> str:
    """Which split of the task may have this clause as a premise: one in ten validation, three in ten test."""
    bucket = zlib.crc32(english(clause).encode()) % 10
    return "test" if bucket < 3 else "validation" if bucket == 3 else "train"


def free_english(clause: Clause, rng: random.Random) -> str:
    """An intransitive clause in English, three times in five with its verb first, second or last and articles dropped
    half of the time."""
    if rng.random() < 0.4:
        return english(clause)
    article_ = "" if rng.random() < 0.5 else "the "
    subject = f" {clause.conjunction} ".join(f"{article_}{noun}" for noun in clause.subjects)
    plural = len(clause.subjects) > 1 and clause.conjunction == "and"
    verb = (clause.verb or "") if plural and not clause.past else english_verb(clause.verb or "", clause.past)
    parts = [clause.adverb] if clause.adverb else []
    if clause.place:
        place = f"{clause.preposition} {article_}{clause.place}"
        if rng.random() < 0.4:
            place = f"{clause.place} {clause.preposition}"
        parts.append(place)
    rest = " ".join(parts)
    orders = ((subject, verb, rest), (subject, rest, verb), (verb, subject, rest))
    return " ".join(part for part in rng.choice(orders) if part)
