"""Benchmark results: reading them, speed-ups within a run, Markdown, and what changed between two runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mtllm_fast.reporting.table import Table

from ..ceilings import describe
from ..common import Record, percentile

Cells = tuple[list[str], list[list[str]]]
NOISE = 0.05  # a change below this share is not reported, however narrow the intervals are


def read_results(paths: Iterable[str | Path]) -> list[Record]:
    """The records of result files, in their order; the last of equal ones (same case, size, variant, device) counts.

    Raises:
        ValueError: no file, or no result file.
    """
    found: dict[tuple[Any, ...], Record] = {}
    known = {field.name for field in fields(Record)}
    for path in paths:
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"results={str(path)!r}: no such file")
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
            for row in rows:
                record = Record(**{k: v for k, v in row.items() if k in known})
                found[key(record)] = record
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise ValueError(f"results={str(path)!r}: not a result file of `mtllm bench --json`: {error}") from None
    if not found:
        raise ValueError(f"results: {', '.join(map(str, paths))} hold no records")
    return list(found.values())


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same measurement."""
    shape = tuple(sorted(record.shape.items()))
    return record.case, record.size, shape, record.dtype, record.device, record.variant


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Records that ran side by side: one case at one size on one device."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(key(record)[:-1], []).append(record)
    return list(found.values())


@dataclass(frozen=True)
class Speedup:
    """A variant of ours against another one in the same run: time ratios, above 1 where ours is faster."""

    ours: Record
    other: Record
    middle: float
    low: float  # p20 of the ratios within rounds
    high: float

    @property
    def memory(self) -> float | None:
        """Our peak memory as a share of the other's."""
        if self.ours.peak_incremental_mib is None or not self.other.peak_incremental_mib:
            return None
        return self.ours.peak_incremental_mib / self.other.peak_incremental_mib

    @property
    def verdict(self) -> str:
        """ "faster", "slower", or "even" where the interval holds 1."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "even"


def speedups(records: Sequence[Record]) -> list[Speedup]:
    """Every green variant of ours called "ours" (or the first of ours) against every green other one.

    A variant whose gate is not green has no time and appears nowhere.
    """
    found = []
    for group in groups(records):
        timed = [r for r in group if r.gate == "pass" and r.time_ms is not None]
        ours = next((r for r in timed if r.variant == "ours"), next((r for r in timed if r.ours), None))
        if ours is None:
            continue
        for other in timed:
            if other.ours or other is ours:
                continue
            assert ours.time_ms is not None and other.time_ms is not None
            if len(ours.round_ms) == len(other.round_ms) > 0:
                ratios = [b / a for a, b in zip(ours.round_ms, other.round_ms)]
            else:
                ratios = [other.time_ms / ours.time_ms]
            found.append(Speedup(ours, other, *(percentile(ratios, q) for q in (0.5, 0.2, 0.8))))
    return found


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands grouped; "-" for nothing."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def floor_share(record: Record) -> str:
    """Percent of the floor's speed."""
    if record.floor_ms is None or not record.time_ms:
        return "-"
    return f"{100 * record.floor_ms / record.time_ms:.0f} %"


def error(record: Record) -> str:
    """The gate's largest relative error."""
    return f"{max(record.gate_detail.values()):.0e}" if record.gate_detail else "-"


def speedup_table(found: Sequence[Speedup]) -> Cells:
    """One row per speed-up, each with gate, memory and floor."""
    header = ["case", "size", "against", "speed-up", "p20 to p80", ""]
    header += ["ours ms", "ours MiB", "memory", "of floor", "error"]
    rows = []
    for s in found:
        ratios = [f"{s.middle:.2f}", f"{s.low:.2f} to {s.high:.2f}", "" if s.verdict == "faster" else s.verdict]
        memory = [number(s.ours.peak_incremental_mib), "-" if s.memory is None else f"{s.memory:.2f}"]
        ours = [number(s.ours.time_ms), *memory, floor_share(s.ours), error(s.ours)]
        rows.append([s.ours.case, s.ours.size, s.other.variant, *ratios, *ours])
    return header, rows


def group_table(group: Sequence[Record]) -> Cells:
    """All variants of one case at one size."""
    header = ["variant", "gate", "ms (p50)", "p20", "p80", "forward ms"]
    header += ["peak MiB", "of floor", "host syncs", "error", ""]
    rows = [
        [
            r.variant,
            {"pass": "green", "fail": "RED", "none": "-"}[r.gate],
            *(number(x) for x in (r.time_ms, r.time_ms_p20, r.time_ms_p80, r.forward_ms, r.peak_incremental_mib)),
            floor_share(r),
            "-" if r.host_syncs is None else str(r.host_syncs),
            error(r),
            r.notes,
        ]
        for r in group
    ]
    return drop_empty((header, rows))


def drop_empty(table: Cells) -> Cells:
    """Without columns that hold nothing."""
    header, rows = table
    keep = [i for i in range(len(header)) if any(row[i] not in ("", "-") for row in rows)] or [0]
    return [header[i] for i in keep], [[row[i] for i in keep] for row in rows]


def details(records: Sequence[Record]) -> Iterator[tuple[str, str, Cells]]:
    """Title, circumstances and table of each group that has times."""
    for group in groups([r for r in records if r.kl is None]):
        first = group[0]
        shape = ", ".join(f"{k} {v}" for k, v in first.shape.items())
        title = ", ".join(x for x in (first.case, first.size) if x)
        yield title, f"{shape}; {first.dtype}; {first.device}", group_table(group)


def accuracy_table(records: Sequence[Record]) -> Cells | None:
    """Gradient error by distance from the teacher, from the records that have one."""
    found = [r for r in records if r.kl is not None]
    if not found:
        return None
    kls = sorted({r.kl for r in found if r.kl is not None}, reverse=True)
    by = {(r.variant, r.kl): r.gate_detail["gradient"] for r in found}
    rows = [
        [name, *(f"{100 * by[name, kl]:.2f} %" if (name, kl) in by else "-" for kl in kls)]
        for name in dict.fromkeys(r.variant for r in found)
    ]
    return ["gradient error, bf16 inputs", *(f"KL {kl:.2g}" for kl in kls)], rows


def caveats(records: Sequence[Record]) -> list[str]:
    """What a reader must know before quoting a number."""
    notes = [
        "A variant gets a time only if its result agrees with fp64 (error: the largest relative one). Times are "
        "medians over rounds in which every variant ran once; speed-ups are medians of the ratios within rounds.",
        "of floor: the time that the measured ceilings allow for the least bytes and FLOPs, over the time taken. Small "
        "problems can pass 100 %, since they stay in caches that the copy ceiling does not.",
    ]
    for ceilings in {json.dumps(r.ceilings): r.ceilings for r in records if r.ceilings}.values():
        torch_rate, own_rate = (ceilings.get(f"gemm_fp32_{name}") for name in ("torch", "onednn"))
        if torch_rate and own_rate and own_rate > 1.15 * torch_rate:
            notes.append(
                f"On this CPU torch.mm reaches {torch_rate / 1e9:,.0f} GFLOP/s in fp32 and oneDNN, which our CPU "
                f"kernels and Engine.encode call, {own_rate / 1e9:,.0f}: part of the gain of linear_kl, "
                f"packed_projection and encode is the library ({own_rate / torch_rate:.1f} times). The variants gemms, "
                "gemms-torch and ours-packing show it; in training steps the models' layers use torch.mm in every one."
            )
            break
    if red := [f"{r.case} {r.size} {r.variant}" for r in records if r.gate == "fail"]:
        notes.append("Wrong results, so no speed: " + "; ".join(red) + ".")
    return notes


def provenance(records: Sequence[Record]) -> list[str]:
    """Device, versions, commit, ceilings: a line per device."""
    lines = []
    for device in dict.fromkeys(r.device for r in records):
        mine = [r for r in records if r.device == device]
        versions = ", ".join(f"{name} {value}" for name, value in mine[0].versions.items())
        commits = ", ".join(dict.fromkeys(r.commit for r in mine if r.commit)) or "unknown"
        lines.append(f"{device}; {versions}; commit {commits}")
        ceilings = next((r.ceilings for r in mine if "copy" in r.ceilings), None)
        if ceilings:
            lines.append(describe(ceilings))
    return lines


def markdown_table(table: Cells) -> list[str]:
    header, rows = table
    return Table(header, rows, left=len(header)).markdown()


def to_markdown(records: Sequence[Record], changes: Sequence[Change] = ()) -> str:
    """The whole report."""
    lines = ["# Throughput", "", *(f"- {line}" for line in provenance(records)), ""]
    if changes:
        lines += ["## Against the older results", "", *markdown_table(change_table(changes)), ""]
    if found := speedups(records):
        lines += ["## Speed-ups", "", *markdown_table(drop_empty(speedup_table(found))), ""]
        lines += [f"- {note}" for note in caveats(records)] + [""]
    if accuracy := accuracy_table(records):
        lines += ["## Accuracy near the teacher", "", *markdown_table(accuracy), ""]
    for title, about, table in details(records):
        lines += [f"## {title}", "", about, "", *markdown_table(table), ""]
    return "\n".join(lines)


# ---- two runs


@dataclass(frozen=True)
class Change:
    """One measurement in two runs. ratio: new time over old; memory: new peak over old, None where not measured."""

    old: Record
    new: Record

    @property
    def ratio(self) -> float:
        assert self.old.time_ms and self.new.time_ms
        return self.new.time_ms / self.old.time_ms

    @property
    def memory(self) -> float | None:
        if not self.old.peak_incremental_mib or self.new.peak_incremental_mib is None:
            return None
        return self.new.peak_incremental_mib / self.old.peak_incremental_mib

    @property
    def verdict(self) -> str:
        """ "slower" and "faster" only where the intervals from p20 to p80 are apart and the change exceeds `NOISE`."""
        old, new = self.old, self.new
        if new.gate == "fail" and old.gate != "fail":
            return "BROKEN"
        bounds = (old.time_ms_p20, old.time_ms_p80, new.time_ms_p20, new.time_ms_p80)
        assert all(b is not None for b in bounds)
        words = []
        if bounds[2] > bounds[1] and self.ratio > 1 + NOISE:  # type: ignore[operator]
            words.append("SLOWER")
        elif bounds[3] < bounds[0] and self.ratio < 1 - NOISE:  # type: ignore[operator]
            words.append("faster")
        if self.memory is not None and self.memory > 1 + NOISE and self.more_mib > 1:
            words.append("MORE MEMORY")
        return ", ".join(words)

    @property
    def more_mib(self) -> float:
        return (self.new.peak_incremental_mib or 0.0) - (self.old.peak_incremental_mib or 0.0)


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Measurements that both runs hold, timed in both, or whose gate turned red.

    Raises:
        ValueError: nothing in common.
    """
    before = {key(r): r for r in old}
    found = []
    for record in new:
        other = before.get(key(record))
        if other is None or other.time_ms is None:
            continue
        if record.time_ms is not None or record.gate == "fail":
            found.append(Change(other, record))
    if not found:
        raise ValueError(
            "the two results have no measurement in common (same case, size, shape, dtype, device, variant)"
        )
    return found


def change_table(changes: Sequence[Change]) -> Cells:
    """Flagged ones first."""
    header = ["case", "size", "variant", "old ms", "new ms", "new / old", "memory", "beyond noise"]
    rows = []
    for c in sorted(changes, key=lambda c: (not c.verdict.isupper(), not c.verdict)):
        times = [number(c.old.time_ms), number(c.new.time_ms), "-" if c.new.time_ms is None else f"{c.ratio:.2f}"]
        memory = "-" if c.memory is None else f"{c.memory:.2f}"
        rows.append([c.new.case, c.new.size, c.new.variant, *times, memory, c.verdict])
    return header, rows


def regressions(changes: Sequence[Change]) -> list[str]:
    """What got worse beyond noise."""
    return [
        f"{c.new.case} {c.new.size} {c.new.variant}: {c.verdict}" for c in changes if c.verdict and c.verdict.isupper()
    ]
