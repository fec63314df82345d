"""The languages of the world: how a clause is said in English and in each generated language.

A language has its own words (made from its own sounds), script, word order and affixes. Two of the languages with
little parallel text descend from one with much by regular sound changes, a share of their words replaced; a third has
no relative.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

ENGLISH = "eng_Latn"


@dataclass(frozen=True, slots=True)
class Clause:
    """What a clause says, before any language says it. Words are English lemmas; without a verb it is a noun phrase."""

    subjects: tuple[str, ...]
    conjunction: str
    adjective: str | None
    definite: bool
    verb: str | None
    past: bool
    object: str | None
    object_definite: bool
    adverb: str | None
    place: str | None
    preposition: str


IRREGULAR = {
    "stay": ("stays", "stayed"),
    "fall": ("falls", "fell"),
    "sink": ("sinks", "sank"),
    "find": ("finds", "found"),
    "hide": ("hides", "hid"),
}


def english(clause: Clause) -> str:
    noun = f" {clause.conjunction} ".join(clause.subjects)
    if clause.adjective:
        noun = f"{clause.adjective} {noun}"
    if clause.verb is None:
        return _determined(noun, clause.definite)
    plural = len(clause.subjects) > 1 and clause.conjunction == "and"
    verb = clause.verb if plural and not clause.past else english_verb(clause.verb, clause.past)
    words = [_determined(noun, clause.definite), verb]
    if clause.object:
        words.append(_determined(clause.object, clause.object_definite))
    if clause.adverb:
        words.append(clause.adverb)
    if clause.place:
        words.append(f"{clause.preposition} the {clause.place}")
    return " ".join(words)


def english_verb(lemma: str, past: bool) -> str:
    if lemma in IRREGULAR:
        return IRREGULAR[lemma][past]
    if lemma.endswith("y"):
        return lemma[:-1] + ("ied" if past else "ies")
    if past:
        return lemma + ("d" if lemma.endswith("e") else "ed")
    return lemma + ("es" if lemma.endswith(("sh", "ch", "s")) else "s")


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _determined(noun: str, definite: bool) -> str:
    return f"the {noun}" if definite else article(noun)


@dataclass(frozen=True)
class Language:
    """One generated language.

    `order` is a permutation of "SVO". `definite` marks nouns by "word", "prefix", "suffix" or "none";
    `past` marks verbs likewise.
    `resources` is "high" or "low": how much parallel text there is.
    """

    code: str
    resources: str
    order: str
    adjective_first: bool
    postpositions: bool
    definite: str
    past: str
    object_case: str
    words: dict[str, str]
    the: str
    did: str
    parent: str | None = None

    def render(self, clause: Clause) -> str:
        nouns = [self._mark(self.words[noun], self.the, self.definite, clause.definite) for noun in clause.subjects]
        subject = f" {self.words[clause.conjunction]} ".join(nouns)
        if clause.adjective:
            adjective = self.words[clause.adjective]
            subject = f"{adjective} {subject}" if self.adjective_first else f"{subject} {adjective}"
        if clause.verb is None:
            return subject
        parts = {"S": subject, "V": self._mark(self.words[clause.verb], self.did, self.past, clause.past), "O": ""}
        if clause.object:
            word = self.words[clause.object] + self.object_case
            parts["O"] = self._mark(word, self.the, self.definite, clause.object_definite)
        sentence = [parts[slot] for slot in self.order if parts[slot]]
        tails = [self.words[clause.adverb]] if clause.adverb else []
        if clause.place:
            pair = [self.words[clause.preposition], self.words[clause.place]]
            tails += reversed(pair) if self.postpositions else pair
        tail = " ".join(tails)
        if tail:
            # In verb-final languages adverbials stand before the verb, elsewhere at the end.
            sentence.insert(len(sentence) - 1 if self.order.endswith("V") else len(sentence), tail)
        return " ".join(sentence)

    @staticmethod
    def _mark(word: str, marker: str, how: str, wanted: bool) -> str:
        if not wanted or how == "none":
            return word
        return {"word": f"{marker} {word}", "prefix": marker + word, "suffix": word + marker}[how]


# One character for each romanised letter; a language uses only some of them.
LETTERS = "aeioubdfghklmnprstvzjcwy"
SCRIPTS = {
    "Latn": LETTERS,
    "Cyrl": "аэиоубдфгхклмнпрствзйцщы",
    "Grek": "αεηουβδφγχκλμνπρστωζιξψυ",
    "Arab": "اےيوۇبدفغهكلمنپرستڤزجچطى",
    "Deva": "अएइओउबदफगहकलमनपरसतवजयचठई",
    "Geor": "აეიოუბდფგჰკლმნპრსტვზჯცწყ",
}

# code, resources, order, adjective_first, postpositions, definite, past, object case letters, parent
DESIGNS: tuple[tuple[str, str, str, bool, bool, str, str, bool, str | None], ...] = (
    ("xaa_Latn", "high", "SVO", False, False, "suffix", "suffix", False, None),
    ("xab_Latn", "low", "SVO", False, False, "suffix", "suffix", False, "xaa_Latn"),
    ("xba_Cyrl", "high", "SOV", True, True, "none", "suffix", True, None),
    ("xbb_Cyrl", "low", "SOV", True, True, "none", "suffix", True, "xba_Cyrl"),
    ("xca_Arab", "high", "VSO", False, False, "prefix", "prefix", False, None),
    ("xda_Deva", "high", "SOV", True, True, "none", "word", True, None),
    ("xea_Grek", "high", "VOS", False, False, "word", "prefix", False, None),
    ("xfa_Geor", "low", "SVO", True, True, "word", "suffix", True, None),
)

# Regular changes from parent to child: no two words of a parent may fall together, which make_languages checks.
SOUND_CHANGES = {
    "xab_Latn": {"p": "f", "t": "z", "k": "g", "a": "o", "o": "u"},
    "xbb_Cyrl": {"b": "v", "d": "t", "s": "z", "i": "e"},
}
REPLACED_SHARE = 0.2


def make_languages(concepts: Iterable[str], *, seed: int) -> dict[str, Language]:
    """Every language of DESIGNS, with a word for each concept; no language has one word for two concepts."""
    concepts = list(concepts)
    languages: dict[str, Language] = {}
    roman: dict[str, dict[str, str]] = {}
    for code, resources, order, adjective_first, postpositions, definite, past, has_case, parent in DESIGNS:
        rng = random.Random(f"{seed}/language {code}")
        coin = _WordMaker(rng)
        if parent is None:
            words = {concept: coin.word(2 if index % 3 else 3) for index, concept in enumerate(concepts)}
            markers = {"the": coin.word(1), "did": coin.word(1), "case": coin.word(1) if has_case else ""}
        else:
            words, markers = {}, {}
            change = str.maketrans(SOUND_CHANGES[code])
            for concept, word in roman[parent].items():
                changed = word.translate(change)
                if concept.startswith("#"):
                    markers[concept[1:]] = changed
                elif rng.random() < REPLACED_SHARE or not coin.take(changed):
                    words[concept] = coin.word(2)
                else:
                    words[concept] = changed
        roman[code] = {**words, **{f"#{name}": marker for name, marker in markers.items()}}
        script = str.maketrans(LETTERS, SCRIPTS[code.split("_")[1]])
        languages[code] = Language(
            code,
            resources,
            order,
            adjective_first,
            postpositions,
            definite,
            past,
            markers["case"].translate(script),
            {concept: word.translate(script) for concept, word in words.items()},
            markers["the"].translate(script),
            markers["did"].translate(script),
            parent,
        )
    return languages


class _WordMaker:
    """Coins words that it has not coined before, from one language's own choice of sounds."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.vowels = rng.sample("aeiou", 4)
        self.consonants = rng.sample(LETTERS[5:], 12)
        self.taken: set[str] = set()

    def take(self, word: str) -> bool:
        if word in self.taken:
            return False
        self.taken.add(word)
        return True

    def word(self, syllables: int) -> str:
        while True:
            word = "".join(self.rng.choice(self.consonants) + self.rng.choice(self.vowels) for _ in range(syllables))
            if self.rng.random() < 0.5:
                word += self.rng.choice(self.consonants)
            if self.take(word):
                return word
