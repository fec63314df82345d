"""Length distributions: real texts where the data is present (`MTLLM_DATA`, or ../shared/data), else drawn like them.

Tokens are counted as pieces of at most 4 characters and 2 special tokens, for which no tokenizer is needed.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import product

import torch

from . import DATA

SHARES = (0.0, 0.1, 0.25, 0.4, 0.5)


def pieces(text: str) -> int:
    """Tokens of a text, roughly."""
    return 2 + sum(-(-len(word) // 4) for word in re.findall(r"\w+|[^\w\s]", text))


def drawn(median: float, spread: float, low: int, high: int, count: int, seed: int = 0) -> list[int]:
    """Log-normal lengths, cut to [low, high] as a limit on tokens cuts documents."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(count).log_normal_(math.log(median), spread, generator=generator)
    return [min(high, max(low, int(n))) for n in values]


def sib200(languages: Iterable[str], splits: Iterable[str]) -> list[tuple[str, str]]:
    """(sentence, language) of SIB-200's files, one file after the other."""
    found: list[tuple[str, str]] = []
    for language, split in product(languages, splits):
        with (DATA / "sib200" / language / f"{split}.tsv").open(newline="", encoding="utf-8") as file:
            found += [(row["text"], language) for row in csv.DictReader(file, delimiter="\t")]
    return found


def swahili_xnli() -> list[tuple[str, str]]:
    """(premise, hypothesis) of the test set."""
    with gzip.open(DATA / "xnli" / "sw" / "test.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        cells = [line.rstrip("\n").split("\t") for line in file]
    return [(cell[0], cell[1]) for cell in cells]


@cache
def sentence_texts() -> tuple[str, ...] | None:
    """Sentences of SIB-200 in four languages, shuffled; None where the data is absent."""
    if not (DATA / "sib200").is_dir():
        return None
    texts = [text for text, _ in sib200(("swh_Latn", "hau_Latn", "eng_Latn", "deu_Latn"), ("test",))]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(texts[i] for i in order)


@cache
def nli_texts() -> tuple[tuple[str, str], ...] | None:
    """(premise, hypothesis) of MNLI, or of Swahili XNLI; None where neither is present."""
    english = DATA / "mnli_sample" / "en" / "train.json"
    if english.is_file():
        with english.open(encoding="utf-8") as file:
            rows = json.load(file).values()
        return tuple((row["text_a"], row["text_b"]) for row in rows)
    return tuple(swahili_xnli()) if (DATA / "xnli" / "sw" / "test.tsv.gz").is_file() else None


def sentences(count: int) -> list[int]:
    """Sentences of SIB-200 (FLORES), or drawn: median 34, log-spread 0.4."""
    texts = sentence_texts()
    return [pieces(t) for t in texts[:count]] if texts and len(texts) >= count else drawn(34, 0.4, 6, 128, count)


def nli(count: int) -> list[int]:
    """Premise and hypothesis of MNLI, or drawn: median 42, log-spread 0.55."""
    pairs = nli_texts()
    if pairs and len(pairs) >= count:
        return [min(256, pieces(a) + pieces(b)) for a, b in pairs[:count]]
    return drawn(42, 0.55, 8, 256, count)


def web(count: int, limit: int = 512) -> list[int]:
    """Documents like FineWeb's: median 420 tokens, log-spread 1.0 (mean 690), cut at `limit`; always drawn."""
    return drawn(420, 1.0, 16, limit, count)


def long_tail(count: int) -> list[int]:
    """Median 25, log-spread 0.7."""
    return drawn(25, 0.7, 1, 512, count)


def padding(share: float, count: int, longest: int = 64) -> list[int]:
    """Lengths spread evenly around their mean, with `share` of the padded batch being padding."""
    return [max(1, round(longest * (1 - 2 * share * i / max(count - 1, 1)))) for i in range(count)]


DISTRIBUTIONS: dict[str, Callable[[int], list[int]]] = {
    "web text": web,
    "NLI": nli,
    "sentences": sentences,
    "long tail": long_tail,
    **{f"padding {share:.0%}": partial(padding, share) for share in SHARES},
}
