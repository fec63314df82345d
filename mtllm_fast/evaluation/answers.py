"""The number that a written answer comes to, and whether it is the right one: exact match of generated answers.

One rule for all languages and models, which knows nothing of either: **the last number in the answer counts**, whatever
stands around it ("#### 18", "\\boxed{18}", "= 18 dollars", "18。").

* Digits of every script count (0-9, ٠-٩, ۰-۹, ०-९, ০-৯, ౦-౯, ๐-๙, full width). Words do not, nor does 十八; 3万 is
  3.
* One kind of point or comma: repeated, it separates groups (1,234,567; 1.234.567; 12,34,567 as in India); single, it
  does so before exactly three digits (1,000 and 1.000 are 1000) and is a decimal mark else (1.5; 1,25; 0.125).
* Both kinds: the last one is the decimal mark (1,234.50 and 1.234,50).
* Groups of three may also stand apart by a space of any width, an apostrophe or ٬; ٫ is a decimal mark.
* Numbers that are joined but are no groups (1,2,3; 12.05.2024; 1/2; 3-5; 10:30) are several, of which the last counts.
* A minus counts where it stands before the number and behind neither letter nor digit nor closing bracket.

So 3.125 is read as 3125: the price of reading 1.234 as it is written in German, Spanish or Turkish. Values are compared
exactly, as decimals: 18.0 is 18, and 18.5 is not.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

EXTRACTION = "the last number in the answer"  # as a report says it

_ALIKE = {"，": ",", "．": ".", "٬": "'", "’": "'", "−": "-", "－": "-", "﹣": "-"}
_NUMBER = re.compile(r"(?<!\d)[1-9]\d{0,2}(?: \d{3})+(?!\d)(?:[.,٫]\d+)?|\d+(?:[.,'٫]\d+)*", re.ASCII)
_PIECES = re.compile(r"([.,'٫])")
_GROUPED = re.compile(r"[1-9]\d{0,2}([.,'])\d{3}(\1\d{3})*|[1-9]\d?(,\d{2})+,\d{3}", re.ASCII)


def number_of(answer: str) -> Decimal | None:
    """The last number in a text, by the rules of the module; None where there is none."""
    text = "".join(map(_plain, answer))
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    number, start = _last_of(found[-1][0])
    return -Decimal(number) if _has_minus(text[: found[-1].start() + start]) else Decimal(number)


def is_right(answer: str, target: str) -> bool:
    """Whether the number of an answer is that of the right one. Raises ValueError where `target` holds none."""
    if (right := number_of(target)) is None:
        raise ValueError(f"target={target!r}: holds no number to compare answers with")
    return number_of(answer) == right


def _plain(character: str) -> str:
    """The ASCII that a digit, mark or space stands for; "" for marks of writing direction."""
    if character.isascii():
        return character
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    return "" if kind == "Cf" else " " if kind == "Zs" else _ALIKE.get(character, character)


def _last_of(run: str) -> tuple[str, int]:
    """Digits with "." for a decimal mark, of the last number in digits and marks; and where it begins there."""
    pieces = _PIECES.split(run)  # digits, mark, digits, ...
    marks, tail = pieces[1::2], pieces[-1]
    if not marks or _GROUPED.fullmatch(run):
        return _digits(run), 0
    head = run[: -len(tail) - 1]
    if marks.count(marks[-1]) > 1 or marks[-1] == "'":
        return tail, len(run) - len(tail)
    if _GROUPED.fullmatch(head) or not _PIECES.search(head):
        return f"{_digits(head)}.{tail}", 0
    return f"{pieces[-3]}.{tail}", len(run) - len(tail) - 1 - len(pieces[-3])


def _digits(run: str) -> str:
    return re.sub(r"\D", "", run)


def _has_minus(before: str) -> bool:
    if before and unicodedata.category(before[-1]) == "Sc":  # -$5
        before = before[:-1]
    return before.endswith("-") and not (before[-2:-1].isalnum() or before[-2:-1] in {")", "]", "}", "%"})
