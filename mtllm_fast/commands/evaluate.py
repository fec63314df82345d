"""mtllm evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def mapping(pairs: Sequence[str], option: str) -> dict[str, str]:
    """("arb_Latn=arb_Arab", ...) as a dictionary."""
    out = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not (key and sign and value):
            raise ValueError(f"{option} {pair!r}: expected CODE=MT_CODE, e.g. arb_Latn=arb_Arab")
        out[key] = value
    return out


@dataclass
class Evaluate:
    """Zero-shot accuracy and macro-F1 in every language of a task.

    A model without a task head is read by a linear probe fitted on the English training split, and the report says so.
    Example: mtllm evaluate --model runs/sib200 --task sib200 --data DIR --translator facebook/nllb-200-distilled-600M
    --teacher runs/teacher --output runs/sib200-scores
    """

    model: tuple[str, ...] = ()
    """One or more model folders."""
    task: str = ""
    """sib200, nusax, nli, or "folder" for a folder of <language>/<split>.tsv files."""
    data: str = ""
    """The task's folder in its published format, or its hub name."""
    languages: tuple[str, ...] = ("all",)
    """The data set's own codes, or "all"."""
    language_map: tuple[str, ...] = ()
    """CODE=MT_CODE for languages that the MT encoder has no code for, e.g. arb_Latn=arb_Arab."""
    split: str = "test"
    limit: int | None = None
    """Only the first rows of each language."""
    translator: str = ""
    """MT model for translate-test (folder or hub name); needs `teacher`."""
    teacher: str = ""
    """Task teacher that classifies the translations."""
    num_beams: int = 1
    probe_data: str = ""
    """Where a probe's English rows come from, if not from `data`."""
    max_tokens: int = 8192
    """Token budget of one forward pass."""
    output: str = ""
    """Folder for scores.json, scores.md and scores.png; "" puts them into `evaluation` inside the (first) model."""
    overwrite: bool = False
    """Replace a report that is already there."""
    progress: bool = True

    def run(self) -> None:
        from ..evaluation import evaluate
        from ..reporting import check_output, print_scores, write_report

        for name in ("task", "data"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if not self.model and not self.translator:
            raise ValueError("--model is missing: name at least one model folder")
        output = self.output or str(Path((*self.model, self.teacher)[0]) / "evaluation")
        check_output(output, overwrite=self.overwrite)
        scores = evaluate(
            list(self.model) if self.model else {},
            self.task,
            self.data,
            languages="all" if self.languages == ("all",) else list(self.languages),
            language_map=mapping(self.language_map, "--language-map"),
            split=self.split,
            limit=self.limit,
            translator=self.translator or None,
            teacher=self.teacher or None,
            num_beams=self.num_beams,
            probe_source=self.probe_data or None,
            max_tokens=self.max_tokens,
            progress=self.progress,
        )
        paths = write_report(scores, output, overwrite=self.overwrite)
        print_scores(scores)
        print("written:", ", ".join(str(path) for path in paths.values()))
