"""The one table, and how it looks in Markdown, in LaTeX and on a console."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "’": "'", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "\n": " ",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells as text. `left`: how many columns, from the first, hold words, not numbers; `bold`: rows that stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""
    note: str = ""
    bold: AbstractSet[int] = frozenset()

    def markdown(self) -> list[str]:
        """Its lines, without title and note."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        rule = [" --- " if index < self.left else " ---: " for index in range(len(self.header))]
        rows = [
            [f"**{cell}**" if cell and index in self.bold else cell for cell in row]
            for index, row in enumerate(self.rows)
        ]
        return [line(self.header), "|" + "|".join(rule) + "|", *map(line, rows)]

    def latex(self, caption: str, label: str) -> list[str]:
        """Its lines for booktabs, a longtable above 40 rows. `caption` is text, `label` is taken as it is."""
        columns = "l" * self.left + "r" * (len(self.header) - self.left)
        head = " & ".join(map(_latex_cell, self.header)) + r" \\"
        named = rf"\caption{{{latex_escape(caption)}}}\label{{{label}}}"
        body = []
        for index, row in enumerate(self.rows):
            if index in self.bold and index - 1 not in self.bold:
                body.append(r"\midrule")
            body.append(" & ".join(map(_latex_cell, row)) + r" \\")
        if len(self.rows) > 40:
            lines = [rf"\begin{{longtable}}{{{columns}}}", rf"{named}\\", r"\toprule", head, r"\midrule", r"\endhead"]
            return [*lines, *body, r"\bottomrule", r"\end{longtable}"]
        lines = [r"\begin{table}", r"\centering", named, rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head]
        return [*lines, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]

    def console(self) -> rich.table.Table:
        """With lines above the bold rows."""
        from rich.table import Table

        long = len(self.rows) - len(self.bold) > 20
        table = Table(title=self.title, header_style="bold", row_styles=("", "dim") if long else None)
        for index, name in enumerate(self.header):
            if index < self.left:
                table.add_column(name, no_wrap=True)
            else:
                table.add_column(name, justify="right", min_width=5, overflow="fold")
        for index, row in enumerate(self.rows):
            if index in self.bold and index - 1 not in self.bold:
                table.add_section()
            table.add_row(*row, style="bold" if index in self.bold else None)
        return table


def latex_escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_cell(cell: str) -> str:
    text = latex_escape(cell)
    if text[:1] == "-" and text[1:2].isdigit():
        text = "$-$" + text[1:]
    return text.replace("[-", "[$-$").replace(", -", ", $-$").replace("*", "$^{*}$")
