"""Writes a world as files, in the layouts that the library's readers and tasks take."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from .languages import ENGLISH
from .world import LABELS, World

PAIR_COLUMNS = ("id", "text", "text_pair", "label")
COLUMNS = ("id", "text", "label")


def write_world(
    world: World, folder: str | Path, *, texts: int, unlabelled: int, train: int, dev: int, test: int
) -> Path:
    """Write the world's corpora and tasks under `folder`.

    adapt/train.txt          English without facts or answers, `texts` lines: what the stack is adapted on
    unlabelled/train.txt     English clauses like the task's about all nouns, without labels: text of stage 3
    kinds/<language>/*.tsv   the task; English has train and dev too, every language the same test rows in its own words
    nli/<language>/*.tsv     a harder task of the same world, which the demo does not run
    parallel/<language>.tsv  what the MT model is trained on (foreign, english)
    knowledge.txt            every fact that the LLM's English states and no other text here does
    """
    root = Path(folder)
    _lines(root / "adapt" / "train.txt", world.adaptation_texts(texts))
    _lines(root / "unlabelled" / "train.txt", world.unlabelled(unlabelled))
    _lines(root / "knowledge.txt", world.facts())
    for code in world.languages:
        _table(root / "parallel" / f"{code}.tsv", ("foreign", "english"), world.parallel(code))
    kinds, nli = root / "kinds", root / "nli"
    _lines(kinds / "labels.txt", world.categories)
    _lines(nli / "labels.txt", LABELS)
    for split, name, count in (("train", "train", train), ("validation", "dev", dev), ("test", "test", test)):
        rows, pairs = world.kind_task(split, count), world.task(split, count)
        for code in (ENGLISH, *(world.languages if split == "test" else ())):
            table = [(str(i), world.render(code, clause), world.categories[k]) for i, (clause, k) in enumerate(rows)]
            _table(kinds / code / f"{name}.tsv", COLUMNS, table)
            paired = [
                (str(i), world.render(code, row.premise), world.render(code, row.hypothesis), LABELS[row.label])
                for i, row in enumerate(pairs)
            ]
            _table(nli / code / f"{name}.tsv", PAIR_COLUMNS, paired)
    return root


def _lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
