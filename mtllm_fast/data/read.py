"""Text rows."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextRow:
    """One example.

    Fields:
        text: the text, or the first text of a pair.
        language: code of the MT tokenizer, e.g. `eng_Latn`.
        text_pair: second text (a hypothesis), or None.
        label: class index, or the index of the right choice.
        id: the row's name in its source.
        choices: answers of a multiple-choice row.
    """

    text: str
    language: str = "eng_Latn"
    text_pair: str | None = None
    label: int | None = None
    id: str | None = None
    choices: tuple[str, ...] | None = None
