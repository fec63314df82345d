"""The README's blocks about real weights, made from committed results.

    python -m benchmarks.real.readme

Each block stands between two markers and is made from one file under benchmarks/results/real; a block whose file is not
there stays empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mtllm_fast.demo.report import HEADER, table_rows, verdict
from mtllm_fast.reporting.table import Table

from .study_table import OURS, by_seed, cell, cost, gains, head, markdown

REPO = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results/real"
GENERATED = "benchmarks/results/miniworld/results.json"


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


def curve_block(results: Mapping[str, Any]) -> list[str]:
    """What more text for stage 1 brings, how far seeds lie apart, and what English validation costs as a chooser."""
    groups = {group: len(codes) for group, codes in results["languages"].items()}
    stacks = {name: system for name, system in results["systems"].items() if "stack" in name or name == OURS}
    heads = [
        "texts of stage 1",
        "English",
        *(f"{name} ({count})" for name, count in groups.items()),
        "seeds, in this order",
    ]
    rows = []
    for name, system in stacks.items():
        cells = [cell(results["english"][name]), *(cell(system["groups"][group]) for group in groups)]
        texts = f"{results['texts'][name]:,}"
        rows.append([texts, *cells, by_seed(system, groups), cost(system)])
    lines = [head(results), "", *Table([*heads, "training, CPU-s"], rows, left=0).markdown(), ""]
    last = f"{results['texts'][OURS]:,}"
    lines += [
        f"- {last} texts against {results['texts'][name]:,}: {gains(system, groups)}"
        for name, system in stacks.items()
        if name != OURS
    ]
    generated = json.loads((REPO / GENERATED).read_text(encoding="utf-8"))["matrix"]["full_kl"]["by_seed"].values()
    spreads = [spread(system["groups"][group]["seeds"]) for system in stacks.values() for group in groups]
    lines.append(
        f"- Three seeds lie {min(spreads):.1f} to {max(spreads):.1f} points apart here, and {spread(generated):.0f} "
        f"in the generated world ([{GENERATED}]({GENERATED}), MT-LLM + KL)."
    )
    looked = results["checkpoints"]
    if looked:
        chosen = listed(100 * run["chosen"] for run in looked)
        best = listed(100 * run["hindsight"] for run in looked)
        languages = sum(groups.values())
        lines.append(
            f"- Stage 3 of {last} texts, looked at {len(looked[0]['steps'])} times in {languages} languages: the "
            f"checkpoint that English validation chose has {chosen} % there, the best in hindsight {best} %."
        )
    return lines


def spread(accuracies: Iterable[float]) -> float:
    values = [100 * value for value in accuracies]
    return max(values) - min(values)


def listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


BLOCKS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "demo": demo_block,
    "sib200": study_block("sib200"),
    "curve": curve_block,
    "nusax": study_block("nusax"),
}


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
