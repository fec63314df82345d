"""mtllm shrink."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..data.read import RowStream


@dataclass
class Shrink:
    """Write a smaller encoder, with its tokenizer, into a folder that `--encoder` of the other commands takes.

    --text keeps the tokens of the texts that you name, special tokens, and the single characters of their scripts; the
    embeddings of all others go. Those texts have the very same states as before. Other texts of their languages may be
    read in smaller pieces, and --held-out counts how many are; a text with a character that is known no more is refused
    when it is read, never read as unknown. So name as much text of each language as you have, a file each.

    --layers keeps every f-th layer. What is left has to be distilled before it is good for anything: `mtllm compress`
    teaches it the whole encoder's states. Source: arXiv 2306.01709.
    Example: mtllm shrink --encoder NLLB --text eng.txt swh.txt --keep-languages eng_Latn swh_Latn --output nllb-en-sw
    """

    REQUIRED: ClassVar = {
        "encoder": "required",
        "output": "required",
        "text": "required, or `layers`",
        "layers": "required, or `text`",
    }
    encoder: str = ""
    """Encoder: folder or hub name, of a family that `adapt` supports (its help names them)."""
    output: str = ""
    """Folder to write; must not exist, but for `overwrite`."""
    text: tuple[str, ...] = ()
    """Texts whose tokens stay: .txt, .jsonl, .csv, .tsv or .parquet (also .gz), folders or globs of them, hub datasets
    "org/name" or "org/name:config"."""
    layers: int | None = None
    """How many layers stay, a divisor of how many there are."""
    held_out: tuple[str, ...] = ()
    """Text of which is counted only how it is read afterwards, as `text`."""
    keep_languages: tuple[str, ...] = ()
    """Language codes that stay; by default all. The one that the tokenizer writes by itself always does."""
    min_frequency: float = 0.0
    """Relative frequency in one of `text` that a token needs to stay, such as 1e-6; by default it is in there at all.
    Texts with a rarer one are read in other tokens afterwards, and counted."""
    text_column: str = "text"
    """Column of the text."""
    quoted: bool = True
    """Quote marks in .csv and .tsv files stand around fields; without, they are text."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """At most this many rows of each."""
    overwrite: bool = False
    """Replace a smaller encoder that OUTPUT is already."""

    def run(self) -> None:
        from ..models.shrink import shrink
        from .files import check_given, check_least
        from .options import check_text

        check_given(self, "encoder", "output")
        if not self.text and self.layers is None:
            raise ValueError("--text and --layers are missing: give one of them, or both")
        check_least(self, limit=1)
        if Path(self.output).exists() and not self.overwrite:
            raise ValueError(f"--output {self.output}: exists; name a folder that does not")
        for source in (*self.text, *self.held_out):
            check_text(source)
        made = shrink(
            self.encoder,
            self.output,
            self._rows(self.text),
            layers=self.layers,
            min_frequency=self.min_frequency,
            keep_languages=self.keep_languages,
            held_out=self._rows(self.held_out),
            overwrite=self.overwrite,
        )
        old, new = made.before, made.after
        print(
            f"shrink: {self.encoder} -> {self.output}: {old.tokens:,} -> {new.tokens:,} tokens, {old.layers} -> "
            f"{new.layers} layers, {old.parameters:,} -> {new.parameters:,} parameters (embeddings "
            f"{old.embeddings:.0%} -> {new.embeddings:.0%}), {old.megabytes:,.1f} -> {new.megabytes:,.1f} MB"
        )
        for name, reading in (("text", made.texts), ("held-out text", made.held_out)):
            if reading is not None:
                print(
                    f"shrink: {name}: {reading.other:,} of {reading.texts:,} texts are read in other tokens than "
                    f"before, {reading.refused:,} of these are refused"
                )
        if made.unreadable:
            print(f"shrink: {made.unreadable:,} texts were left out: the tokenizer cannot read them")
        if made.texts is not None:
            print(f"shrink: {made.removed_characters:,} characters are known no more; texts with one are refused")
        if new.layers < old.layers:
            print("shrink: layers are gone: distil the encoder before you use it (`mtllm compress`)")

    def _rows(self, sources: tuple[str, ...]) -> list[RowStream]:
        from ..data.read import read_rows

        options = {"text_column": self.text_column, "split": self.split, "limit": self.limit, "quoting": self.quoted}
        return [read_rows(source, **options) for source in sources]  # type: ignore[arg-type]
