"""The README's blocks about real weights, made from committed results.

    python -m benchmarks.real.readme

Each block stands between two markers and is made from one file under benchmarks/results/real; a block whose file is not
there stays empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtllm_fast.demo.report import HEADER, table_rows, verdict

from .study_table import head, markdown

REPO = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results/real"


def demo_block(results: Mapping[str, Any]) -> list[str]:
    """What `make demo` found: English, the mean, what that says."""
    rows = table_rows(dict(results))
    mean = [row for row in rows if row[0].startswith("mean")]
    kinds = len({row["script"] for row in results["languages"].values()} | {"Latin"})
    lines = [
        f"`make demo` on 2 CPU cores, {results['seconds']:.0f} s after set-up, {len(results['languages'])} languages "
        f"besides English in {kinds} scripts ({RESULTS}/demo.json has each); accuracy in % [95 % interval over the "
        "rows], chance 12.5 %:",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + " --- |" + " ---: |" * (len(HEADER) - 1),
        *("| " + " | ".join(row) + " |" for row in [rows[0], *mean]),
        "",
        *(f"- {line.strip()}" for line in verdict(dict(results)) if not line.startswith("Chance")),
    ]
    return lines


def study_block(name: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """The table of a study, and where every language of it stands."""

    def block(results: Mapping[str, Any]) -> list[str]:
        return [head(results), "", *markdown(results), "", f"Every language: [{name}.json]({RESULTS}/{name}.json)."]

    return block


BLOCKS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {"demo": demo_block, "sib200": study_block("sib200")}


def with_blocks(text: str) -> str:
    """A README's text with its blocks as the committed results say them."""
    for name, make in BLOCKS.items():
        path = REPO / RESULTS / f"{name}.json"
        content = make(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        block = "\n".join([begin, *content, end])
        if begin not in text or end not in text:
            raise ValueError(f"README.md: has no {begin} ... {end}")
        text = re.sub(f"{begin}.*?{end}", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def main() -> None:
    readme = REPO / "README.md"
    readme.write_text(with_blocks(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
