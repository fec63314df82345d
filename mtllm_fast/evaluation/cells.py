"""Finished parts of an evaluation on disk, so that a killed run loses at most the part it was in.

A cell is one model (one seed) in one language of one task: a small safetensors file with predictions, logits, gold
labels and ids. It is written whole or not at all, and carries the key it was computed under: what the model, the data
and the settings were. A cell whose key is not today's is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from ..data.read import TextRow
from ..jobs import fingerprint
from ..jobs.ledger import Key, Ledger

_ARRAYS = ("logits", "predictions", "gold")  # the fields of a Cell that are tensors in its file


def of_rows(rows: Sequence[TextRow], labels: Iterable[str] = ()) -> str:
    """Fingerprint of everything that rows say, except the language code they are read under (that is a setting)."""
    content = [
        [
            *(row.text, row.text_pair, row.label, row.id, row.choices),
            *([] if row.target is None else [row.target]),
            *([] if row.teacher_text is None else [{"partner": [row.teacher_text, row.teacher_pair]}]),
        ]
        for row in rows
    ]
    return fingerprint.short(json.dumps([list(labels), content], ensure_ascii=False))


@dataclass(frozen=True, eq=False)
class Cell:
    """One model in one language.

    Fields:
        logits: (N, C) float32; predictions, gold: (N,) int64, their argmax and the right class. Of a generated task the
            classes are wrong and right, and all of `gold` is right. A row that the tokenizer fails on has the
            prediction UNREAD, and logits of 0.
        ids: N names of rows.
        mt_code, mapped: as in `LanguageScore`.
        blank: rows with an empty text.
        counts: things counted on the way, e.g. truncated texts.
        time_s: seconds spent predicting.
        answers: what the model wrote, of a generated task.
        skipped: why the model was not run in this language; then there are no rows.
    """

    logits: npt.NDArray[np.float32]
    predictions: npt.NDArray[np.int64]
    gold: npt.NDArray[np.int64]
    ids: tuple[str, ...] = ()
    mt_code: str | None = None
    mapped: bool = False
    blank: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    time_s: float = 0.0
    skipped: str = ""
    answers: tuple[str, ...] = ()

    @classmethod
    def without_rows(cls, reason: str) -> Cell:
        nothing = np.zeros(0, np.int64)
        return cls(np.zeros((0, 0), np.float32), nothing, nothing, skipped=reason)


class CellStore(Ledger):
    """Cells and small records under a folder."""

    def read_cell(self, name: tuple[str, ...], key: Key) -> Cell | None:
        """The cell of that name if it is there and valid."""
        from safetensors import SafetensorError, safe_open

        path = self.path(name, ".safetensors")
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()["cell"])
                if not self.is_valid(about.pop("key"), key):
                    return None
                arrays = {part: file.get_tensor(part) for part in _ARRAYS}
            about |= {name: tuple(about.get(name, ())) for name in ("ids", "answers")}
            cell = Cell(**arrays, **about)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            self.stale["file damaged"] += 1
            return None
        self.reused += 1
        return cell

    def write_cell(self, name: tuple[str, ...], key: Key, cell: Cell) -> None:
        from safetensors.numpy import save

        values = {part.name: getattr(cell, part.name) for part in fields(cell)}
        arrays = {name: np.ascontiguousarray(values.pop(name)) for name in _ARRAYS}
        if not cell.answers:
            del values["answers"]
        about = json.dumps({"key": dict(key), **values}, ensure_ascii=False)
        content = save(arrays, metadata={"cell": about})
        self.write(self.path(name, ".safetensors"), content)
