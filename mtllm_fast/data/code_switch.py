"""Code-switched text: a bilingual dictionary puts words of other languages in the place of English ones.

The student reads the mixed text and the teacher the English one, so that words of other languages come to mean what
their neighbours say (CoSDA-ML, arXiv 2006.06402).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mtllm_fast.data.read import MappedRows, TextRow

_WORD = re.compile(r"\w+")


def read_dictionary(path: str | Path) -> dict[str, list[str]]:
    """English words, in lower case, with their translations, of a file with `word translation` in every line.

    A tab, or the first space, stands between the two (MUSE's format). Several languages may stand in one file.

    Raises:
        ValueError: no such file, or a line without two words.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"code_switch={str(path)!r}: no such file; expected `word translation` lines")
    found: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        word, *rest = (part.strip() for part in (line.split("\t", 1) if "\t" in line else line.split(None, 1)))
        if not word or not rest or not rest[0]:
            raise ValueError(f"code_switch={str(path)!r}: line {number} is {line[:40]!r}; expected `word translation`")
        found.setdefault(word.lower(), []).append(rest[0])
    if not found:
        raise ValueError(f"code_switch={str(path)!r}: holds no words")
    return found


class CodeSwitched(MappedRows):
    """Rows whose text is code-switched, and whose `teacher_text` is the text as it was; re-iterable.

    Every word that the dictionary has is replaced with probability `share`, by one of its translations. The choice is a
    function of the seed and the text alone, so that it is the same in every epoch and process.
    """

    def __init__(
        self, rows: Iterable[TextRow], dictionary: Mapping[str, list[str]], share: float, seed: int = 0
    ) -> None:
        super().__init__(rows)
        self.dictionary, self.share, self.seed = dictionary, share, seed

    def change(self, row: TextRow) -> TextRow:
        return self.switched(row)[0]

    def switched(self, row: TextRow) -> tuple[TextRow, int, int]:
        """The row, its words, and those replaced.

        Raises:
            ValueError: a row that has a teacher_text already, a pair or choices.
        """
        if row.teacher_text is not None or row.text_pair is not None or row.choices is not None:
            raise ValueError("code_switch: takes rows of one text, without a teacher_text, a text_pair or choices")
        chance = random.Random(f"{self.seed}/{row.text}")
        words = replaced = 0

        def switch(match: re.Match[str]) -> str:
            nonlocal words, replaced
            word = match[0]
            words += 1
            options = self.dictionary.get(word.lower())
            if options is None or chance.random() >= self.share:
                return word
            replaced += 1
            new = chance.choice(options)
            return new[:1].upper() + new[1:] if word[:1].isupper() else new

        text = _WORD.sub(switch, row.text)
        return replace(row, text=text, teacher_text=row.text), words, replaced

    def report(self, limit: int = 1000) -> dict[str, int]:
        """Words and replaced words of the first rows."""
        counts = [self.switched(row)[1:] for row in islice(self.rows, limit)]
        return {
            "rows": len(counts),
            "words": sum(words for words, _ in counts),
            "replaced": sum(replaced for _, replaced in counts),
        }
