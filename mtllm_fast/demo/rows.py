"""The demo's texts as the folder of a task: `<language>/<split>.tsv`, and English lines for stage 1."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
ENGLISH = "eng_Latn"
TOPICS = ("animals", "food", "health", "money", "music", "sport", "travel", "weather")


def languages() -> list[str]:
    """Codes of the languages that the test set is written in: English, then the others in order."""
    codes = sorted(path.stem for path in (ASSETS / "test").glob("*_*.txt"))
    return [ENGLISH, *(code for code in codes if code != ENGLISH)]


def check_task(codes: Sequence[str], rows: int) -> None:
    """Raise ValueError for numbers of rows or languages that `write_task` cannot serve."""
    labels = _lines(ASSETS / "test" / "labels.txt")
    if rows % len(TOPICS) or not 0 < rows <= len(labels):
        allowed = ", ".join(str(n) for n in range(len(TOPICS), len(labels) + 1, len(TOPICS)))
        raise ValueError(f"rows={rows}: expected one of {allowed}, the same number of each topic")
    unknown = sorted(set(codes) - set(languages()))
    if unknown:
        raise ValueError(f"languages: no demo texts in {', '.join(unknown)}; there are {', '.join(languages())}")


def write_task(folder: Path, codes: Sequence[str], *, rows: int, train_rows: int) -> None:
    """Write the task into `folder`.

    Args:
        codes: languages of the test split; English is always there.
        rows: test rows a language, a multiple of the eight topics; the same rows in every language.
        train_rows: English training rows, the first ones.

    Raises:
        ValueError: more rows than there are, a number that the topics do not divide, or an unknown language.
    """
    check_task(codes, rows)
    labels = _lines(ASSETS / "test" / "labels.txt")
    train, valid = (_labelled(ASSETS / f"{split}.tsv") for split in ("train", "valid"))
    if not 0 < train_rows <= len(train):
        raise ValueError(f"train_rows={train_rows}: expected 1 to {len(train)}")
    chosen = [index for topic in TOPICS for index in _of(topic, labels)[: rows // len(TOPICS)]]
    for code in dict.fromkeys([ENGLISH, *codes]):
        texts = _lines(ASSETS / "test" / f"{code}.txt")
        _write(folder / code / "test.tsv", [(f"{i:02}", labels[i], texts[i]) for i in chosen])
    for split, content in (("train", train[:train_rows]), ("dev", valid)):
        _write(folder / ENGLISH / f"{split}.tsv", [(str(i), *row) for i, row in enumerate(content)])
    (folder / "labels.txt").write_text("".join(f"{topic}\n" for topic in TOPICS), encoding="utf-8")


def _of(topic: str, labels: Sequence[str]) -> list[int]:
    return [index for index, label in enumerate(labels) if label == topic]


def _labelled(path: Path) -> list[tuple[str, str]]:
    pairs = (line.split("\t") for line in _lines(path))
    return [(topic, text) for topic, text in pairs]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _write(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", "label", "text"))
        writer.writerows(rows)
