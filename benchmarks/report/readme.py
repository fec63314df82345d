"""The README's benchmark table, made from committed result files, and how it is known to be out of date."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..common import Record
from ..sources import sources_hash
from .throughput import Speedup, caveats, floor_share, markdown_table, number, read_results, speedups

_MADE = re.compile(r"<!-- made by: mtllm report --readme \S+ (.*?) -->")
# What is compared with what: the ordinary way first.
BASELINES = ("padded, 4-D mask", "padded", "unfused", "padded, 32 in order", "peft")
# (case, sizes) that a reader of the README wants; the report has all.
HEADLINES = (
    ("adaptation_step", ("NLI, KL", "web text, KL", "NLI", "web text")),
    ("task_distillation_step", ("NLI",)),
    ("encode", ("xnli", "sib200")),
    ("translate", ("384 texts",)),
    ("pack_collate", ("NLI",)),
    ("label_likelihood", ("3 labels", "4 choices")),
    ("linear_kl", ("2048x1024x64000", "8192x4096x128256")),
    ("packed_projection", ("NLI", "web text")),
    ("pooled_mse", ("NLI",)),
    ("paired_mse", ("NLI",)),
    ("distillation_loss", ("NLI", "web text")),
    ("attention", ("NLI", "web text")),
)


def headline(records: Sequence[Record]) -> list[Speedup]:
    """The README's rows.

    Raises:
        ValueError: the results hold none of them.
    """
    found = speedups(records)
    rows = []
    for case, sizes in HEADLINES:
        for size in sizes:
            mine = [s for s in found if s.ours.case == case and s.ours.size == size]
            mine.sort(
                key=lambda s: BASELINES.index(s.other.variant) if s.other.variant in BASELINES else len(BASELINES)
            )
            rows += mine[:1]
    if not rows:
        raise ValueError("results: none of the cases that the README shows is among them; run `mtllm bench all`")
    return rows


def losses(records: Sequence[Record]) -> str:
    """Where a variant of ours is slower than another one, over all cases and sizes of the results."""
    slower: dict[str, list[Speedup]] = {}
    for s in speedups(records):
        if s.verdict == "slower":
            slower.setdefault(f"{s.ours.case} against {s.other.variant}", []).append(s)
    if not slower:
        return "In these results it is slower than nothing that it is compared with."
    parts = [
        f"{name} ({', '.join(f'{s.ours.size} {s.middle:.2f} x' for s in found)})" for name, found in slower.items()
    ]
    return f"Slower: {'; '.join(parts)}."


def readme_block(records: Sequence[Record], readme: str, paths: Sequence[str]) -> str:
    """What stands between the markers."""
    rows = headline(records)
    header = ["what", "size", "against", "speed-up", "p20 to p80", "ours ms", "memory, ours", "theirs", "of floor"]
    cells = []
    for s in rows:
        peaks = [r.peak_incremental_mib for r in (s.ours, s.other)]
        mib = [number(peak) + (" MiB" if peak is not None else "") for peak in peaks]
        speedup = f"{s.middle:.2f} x" + (f" ({s.verdict})" if s.verdict != "faster" else "")
        ours = [f"{s.low:.2f} to {s.high:.2f}", number(s.ours.time_ms), *mib, floor_share(s.ours)]
        cells.append([s.ours.case, s.ours.size, s.other.variant, speedup, *ours])
    first = rows[0].ours
    commits = ", ".join(dict.fromkeys(s.ours.commit for s in rows))
    versions = ", ".join(f"{k} {v}" for k, v in first.versions.items())
    devices = ", ".join(dict.fromkeys(s.ours.device for s in rows))
    library = [note for note in caveats(records) if "oneDNN" in note]
    return "\n".join(
        [
            f"<!-- made by: mtllm report --readme {readme} {' '.join(paths)} -->",
            f"{devices}; {', '.join(dict.fromkeys(s.ours.dtype for s in rows))}; {versions}; commit {commits}.",
            "Every variant gave the right result (against fp64) before it got a time.",
            *library,
            "",
            *markdown_table((header, cells)),
            "",
            losses(records),
        ]
    )


def block_of(text: str, name: str) -> str | None:
    """What stands between the markers of `name` in a README; None without them."""
    found = re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    return found and found.group(1)


def with_block(text: str, name: str, content: str, file: str | Path = "README.md") -> str:
    """A README's text with `content` between the markers of `name`.

    Raises:
        ValueError: there are no such markers.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if (old := block_of(text, name)) is None:
        raise ValueError(f"{file}: has no {begin.strip()} ... {end}; add the two lines where the block belongs")
    return text.replace(f"{begin}{old}{end}", f"{begin}{content}{end}")


def write_readme(readme: Path, paths: Sequence[str]) -> None:
    """Replace the table between the markers of `readme` (result paths relative to it).

    Raises:
        ValueError: no markers, or no such results.
    """
    text = readme.read_text(encoding="utf-8")
    with_block(text, "bench", "", readme)  # refused before any results are read
    relative = [os.path.relpath(path, readme.parent).replace(os.sep, "/") for path in paths]
    block = readme_block(read_results(paths), readme.name, relative)
    readme.write_text(with_block(text, "bench", f"{block}\n", readme), encoding="utf-8")


def stale(readme: Path) -> list[str]:
    """Why the table of `readme` is out of date; empty where it is not, or where there is no table.

    It is stale when it is not what its result files give; when the code that a shown number depends on (its record's
    `source_files`, without comments and docstrings) has changed since; or when a number was measured on a commit that
    is not part of this history. Other commits do not make it stale.
    """
    block = block_of(readme.read_text(encoding="utf-8"), "bench")
    made = _MADE.search(block) if block else None
    if block is None or made is None:
        return []
    names = made.group(1).split()
    try:
        records = read_results([readme.parent / name for name in names])
        expected = readme_block(records, readme.name, names)
    except ValueError as error:
        return [str(error)]
    reasons = []
    if block.strip() != expected.strip():
        reasons.append("the table is not what its result files give; run the command in its first line")
    for shown in headline(records):
        for record in (shown.ours, shown.other):
            name = f"{record.case}, {record.size}, {record.variant}"
            if not record.sources or record.sources != sources_hash(record.source_files):
                reasons.append(f"{name}: {', '.join(record.source_files) or 'its code'} changed since it was measured")
            if not in_history(record.commit, readme.parent):
                reasons.append(f"{name}: measured on commit {record.commit or 'unknown'}, which is not in this history")
    return list(dict.fromkeys(reasons))


def in_history(commit: str, folder: Path) -> bool:
    """Whether `commit` is HEAD or an ancestor of it; True where no history is there to ask (an archive, a shallow
    clone)."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)

    shallow = git("rev-parse", "--is-shallow-repository")
    if shallow.returncode or shallow.stdout.strip() == "true":
        return True
    name = commit.removesuffix("+changes")
    return bool(name) and git("merge-base", "--is-ancestor", name, "HEAD").returncode == 0
