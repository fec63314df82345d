"""The blocks about real weights in the README and in docs/results.md, made from committed results.

    python -m benchmarks.real.readme

Each block stands between two markers and is made from files under benchmarks/results/real; a block whose files are not
there stays empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mtllm_fast.demo.report import HEADER, table_rows, verdict
from mtllm_fast.reporting.table import Table

from .. import REPO
from ..report.readme import with_block
from .study_table import OURS, cell, gains, head, markdown, table_of

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
        *Table(HEADER, [rows[0], *mean]).markdown(),
        "",
        *(f"- {line.strip()}" for line in verdict(dict(results)) if not line.startswith("Chance")),
    ]
    return lines


def study_block(name: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """The table of a study, and where every language of it stands."""

    def block(results: Mapping[str, Any]) -> list[str]:
        return [head(results), "", *markdown(results), "", f"Every language: [{name}.json](../{RESULTS}/{name}.json)."]

    return block


def curve_block(results: Mapping[str, Any]) -> list[str]:
    """What more text for stage 1 brings, how far seeds lie apart, and what English validation costs as a chooser."""
    groups = list(results["languages"])
    stacks = {name: system for name, system in results["systems"].items() if "stack" in name or name == OURS}
    texts = {name: f"{results['texts'][name]:,}" for name in stacks}
    lines = [head(results), "", *table_of(results, "texts of stage 1", texts, left=0).markdown(), ""]
    last = texts[OURS]
    lines += [
        f"- {last} texts against {texts[name]}: {gains(system, groups)}"
        for name, system in stacks.items()
        if name != OURS
    ]
    generated = json.loads((REPO / GENERATED).read_text(encoding="utf-8"))["matrix"]["full_kl"]["by_seed"].values()
    spreads = [spread(system["groups"][group]["seeds"]) for system in stacks.values() for group in groups]
    lines.append(
        f"- Three seeds lie {min(spreads):.1f} to {max(spreads):.1f} points apart here, and {spread(generated):.0f} "
        f"in the generated world ([{GENERATED}](../{GENERATED}), MT-LLM + KL)."
    )
    looked = results["checkpoints"]
    if looked:
        chosen = listed(100 * run["chosen"] for run in looked)
        best = listed(100 * run["hindsight"] for run in looked)
        languages = sum(map(len, results["languages"].values()))
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


def summary_block(demo: Mapping[str, Any], sib200: Mapping[str, Any]) -> list[str]:
    """One line for each group of languages: what reads them how well."""
    names = {"direct": "LLM directly", "encoder_probe": "encoder, probe", "encoder_only": "encoder, fine-tuned"}
    names |= {"mt_llm": OURS}
    demo_mean = [f"{100 * demo['mean'][name]:.1f}" for name in names]
    rows = [[f"`make demo`, topics, {len(demo['mean_of'])} languages read before by the encoder", *demo_mean]]
    for group, codes in sib200["languages"].items():
        cells = [cell(sib200["systems"][name]["groups"][group]) for name in names.values()]
        rows.append([f"SIB-200, {len(codes)} languages {group} by the encoder", *cells])
    lines = Table(["accuracy in %", *names.values()], rows).markdown()
    seeds = len(sib200["seeds"])
    return [*lines, "", f"(SIB-200: {sib200['rows']} rows a language, {seeds} seeds, 95 % intervals over rows.)"]


Block = Callable[..., list[str]]
# page -> block -> what makes it, and of which results
BLOCKS: dict[str, dict[str, tuple[Block, tuple[str, ...]]]] = {
    "README.md": {"summary": (summary_block, ("demo", "sib200"))},
    "docs/results.md": {
        "demo": (demo_block, ("demo",)),
        "sib200": (study_block("sib200"), ("sib200",)),
        "curve": (curve_block, ("curve",)),
        "nusax": (study_block("nusax"), ("nusax",)),
        "nli": (study_block("nli"), ("nli",)),
    },
}


def with_blocks(page: str, text: str) -> str:
    """A page's text with its blocks as the committed results say them."""
    for name, (make, files) in BLOCKS[page].items():
        paths = [REPO / RESULTS / f"{file}.json" for file in files]
        there = all(path.is_file() for path in paths)
        lines = make(*(json.loads(path.read_text(encoding="utf-8")) for path in paths)) if there else []
        text = with_block(text, name, "".join(f"{line}\n" for line in lines), page)
    return text


def main() -> None:
    for page in BLOCKS:
        path = REPO / page
        path.write_text(with_blocks(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
