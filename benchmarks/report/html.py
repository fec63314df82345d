"""Benchmark results as one HTML page: bars as HTML, curves as inline SVG, nothing loaded from outside."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtllm_fast.reporting.html import COLOURS

from ..common import Record
from .throughput import (
    Cells,
    Change,
    Speedup,
    accuracy_table,
    caveats,
    change_table,
    details,
    error,
    floor_share,
    number,
    provenance,
    regressions,
    speedup_table,
    speedups,
)

Points = Sequence[tuple[float, float]]
Lines = Mapping[str, Points]
# more of them than COLOURS has, in the order of a step
PARTS = ("#9aa5b1", "#5b6675", "#c9b458", *COLOURS, "#7a3e9d", "#2b2f36")


def to_html(records: Sequence[Record], changes: Sequence[Change] = (), profile: Mapping[str, Any] | None = None) -> str:
    """The page.

    Args:
        records: of one or more result files.
        changes: a comparison to show first.
        profile: what `mtllm profile --json` wrote: {"medians": {part: seconds}, "device": ...}.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = speedups(records)
    accuracy = accuracy_table(records)
    return environment.get_template("throughput.html.j2").render(
        provenance=provenance(records),
        findings=findings(found, changes),
        bars=[
            _bars(case, [s for s in found if s.ours.case == case]) for case in dict.fromkeys(s.ours.case for s in found)
        ],
        speedups=_view(speedup_table(found)) if found else None,
        notes=caveats(records),
        changes=_view(change_table(changes)) if changes else None,
        figures=figures(records),
        accuracy=_view(accuracy) if accuracy else None,
        profile=_profile(profile) if profile else None,
        details=[{"title": title, "about": about, "table": _view(table)} for title, about, table in details(records)],
    )


def _view(table: Cells) -> dict[str, Any]:
    """Cells, and which columns hold numbers."""
    header, rows = table
    numeric = [
        bool(rows) and all(re.match(r"^[-−]?[\d,.]*( %| x)?$|^-$", row[i]) for row in rows) for i in range(len(header))
    ]
    return {"header": header, "rows": rows, "numeric": numeric}


def findings(found: Sequence[Speedup], changes: Sequence[Change]) -> list[str]:
    """The page in sentences."""
    lines = []
    for case in dict.fromkeys(s.ours.case for s in found):
        mine = [s for s in found if s.ours.case == case]
        best, worst = max(mine, key=lambda s: s.middle), min(mine, key=lambda s: s.middle)
        span = f"{worst.middle:.2f} to {best.middle:.2f}" if len(mine) > 1 else f"{best.middle:.2f}"
        text = f"{case}: {span} times as fast as {'the other variants' if len(mine) > 1 else best.other.variant}"
        if losing := [s for s in mine if s.verdict == "slower"]:
            names = ", ".join(f"{s.other.variant} ({s.ours.size}, {s.middle:.2f})" for s in losing[:4])
            text += f"; slower than {names}" + (f" and {len(losing) - 4} more" if len(losing) > 4 else "")
        lines.append(text + ".")
    if changes:
        worse = regressions(changes)
        lines.insert(
            0, f"Against the older results, {len(worse)} of {len(changes)} measurements got worse beyond noise."
        )
    return lines


def _bars(case: str, found: Sequence[Speedup]) -> dict[str, Any]:
    """Speed-ups of one case on a logarithmic track with 1 in it."""
    values = [v for s in found for v in (s.middle, s.low, s.high)]
    top = max(2.0, *values) * 1.05
    bottom = min(0.8, *values) / 1.05
    span = math.log(top / bottom)

    def place(value: float) -> float:
        return round(100 * math.log(value / bottom) / span, 2)

    bars = []
    for s in found:
        start, end = sorted((place(1.0), place(s.middle)))
        memory = "not measured" if s.memory is None else f"{s.memory:.2f} of its memory"
        bars.append(
            {
                "name": (f"{s.ours.size}: " if s.ours.size else "") + f"against {s.other.variant}",
                "value": f"{s.middle:.2f} ×",
                "start": start,
                "width": round(end - start, 2),
                "low": place(s.low),
                "span": round(place(s.high) - place(s.low), 2),
                "kind": "up" if s.middle >= 1 else "down",
                "sure": s.verdict != "even",
                "hint": f"{number(s.ours.time_ms)} ms against {number(s.other.time_ms)} ms, p20 to p80 {s.low:.2f} to "
                f"{s.high:.2f}; memory: {memory}; {floor_share(s.ours)} of the floor; "
                f"gate green, error {error(s.ours)}",
            }
        )
    return {"case": case, "bars": bars, "one": place(1.0)}


def _profile(profile: Mapping[str, Any]) -> dict[str, Any]:
    medians = {k: float(v) for k, v in profile["medians"].items()}
    whole = sum(medians.values()) or 1.0
    parts = [
        {"name": name, "share": round(100 * s / whole, 1), "ms": number(1e3 * s), "colour": PARTS[i % len(PARTS)]}
        for i, (name, s) in enumerate(medians.items())
    ]
    return {
        "parts": parts,
        "ms": number(1e3 * whole),
        "about": f"one {profile.get('mode', '')} step on {profile.get('device', '?')}",
    }


# ---- curves


def figures(records: Sequence[Record]) -> list[dict[str, str]]:
    """Title, SVG and caption of every figure that the records have data for."""
    found: list[dict[str, str]] = []

    def add(
        title: str, note: str, lines: Lines, x: str, y: str, floor: Points = (), level: float | None = None
    ) -> None:
        found.append({"title": title, "svg": _curves(lines, x, y, floor, level=level), "note": note})

    for name, device, mine in _sweeps(records):
        title = f"{name}: {{}} against rows"
        if any(r.time_ms for r in mine):
            note = f"{device}; the grey line is the floor at the measured ceilings"
            add(title.format("time"), note, _by_variant(mine, "time_ms"), "rows T", "time (ms)", _floor(mine))
        if any(r.peak_incremental_mib for r in mine):
            lines = _by_variant(mine, "peak_incremental_mib")
            add(title.format("peak memory"), device, lines, "rows T", "peak memory (MiB)")
    errors: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        if r.kl:
            errors.setdefault(r.variant, []).append((r.kl, 100 * r.gate_detail["gradient"]))
    if errors:
        title = "Error of the KL's gradient against the distance from the teacher"
        note = "bf16 states and head; a distillation moves from right to left"
        add(title, note, errors, "KL (nats)", "gradient error (%)")
    if sensitivity := _sensitivity(speedups(records)):
        title = "What the lengths decide: speed-up against the share of padding"
        note = "one mark for each distribution of lengths; below 1 the padded chain wins"
        axes = "padding of the padded batch (%)", "times as fast as padded"
        add(title, note, sensitivity, *axes, level=1.0)
    return found


def _sweeps(records: Sequence[Record]) -> list[tuple[str, str, list[Record]]]:
    """Cases that were measured at three or more numbers of rows, all else equal."""
    families: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        if r.gate != "fail" and r.time_ms is not None and r.size.count(",") == 0:
            rest = tuple(sorted((k, v) for k, v in r.shape.items() if k != "T"))
            families.setdefault((r.case, r.device, r.dtype, rest), []).append(r)
    return [
        (f"{case}, {', '.join(f'{k} {v:,}' for k, v in rest)}", f"{device}, {dtype}", mine)
        for (case, device, dtype, rest), mine in families.items()
        if len({r.shape.get("T") for r in mine}) >= 3 and "B" not in dict(rest)
    ]


def _by_variant(records: Sequence[Record], quantity: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        if (value := getattr(r, quantity)) is not None:
            lines.setdefault(r.variant, []).append((r.shape["T"], value))
    return lines


def _floor(records: Sequence[Record]) -> list[tuple[float, float]]:
    return sorted({(r.shape["T"], r.floor_ms) for r in records if r.variant == "ours" and r.floor_ms is not None})


def _sensitivity(found: Sequence[Speedup]) -> dict[str, list[tuple[float, float]]]:
    """Speed-up against the padded chain by padding share, for cases with at least three length distributions."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for s in found:
        shape = s.ours.shape
        if s.other.variant in ("padded", "padded, 4-D mask") and {"B", "T", "L"} <= set(shape):
            widths = ", ".join(f"{k} {v}" for k, v in shape.items() if k in ("E", "D", "H", "d"))
            share = 100 * (1 - shape["T"] / (shape["B"] * shape["L"]))
            lines.setdefault((s.ours.case, widths), []).append((share, s.middle))
    enough = {key: points for key, points in lines.items() if len(points) >= 3}
    cases = [case for case, _ in enough]
    return {
        case if cases.count(case) == 1 else f"{case}, {widths}": points for (case, widths), points in enough.items()
    }


def _curves(lines: Lines, x: str, y: str, floor: Points, *, level: float | None) -> str:
    """A chart as SVG whose text stays readable when it is shrunk to a phone's width.

    With `level`, a line to compare with, the points are not joined: they are of different texts, not of one sweep.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    log = level is None
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "mtllm", "font.size": 11, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 4.6), layout="constrained")
        axis = figure.subplots()
        for i, (name, points) in enumerate(lines.items()):
            ordered = sorted(points)
            mine = name.startswith("ours")
            axis.plot(
                [p[0] for p in ordered],
                [p[1] for p in ordered],
                color=COLOURS[i % len(COLOURS)],
                label=name,
                linewidth=2.4 if mine else 1.4,
                linestyle=("-" if i < len(COLOURS) else "--") if log else "none",
                marker="osD^vP"[i % 6],
                markersize=6 if mine or not log else 4,
            )
        if len(floor) > 1:
            axis.plot(*zip(*floor), color="0.5", linewidth=3, alpha=0.6, label="floor", zorder=0)
        if log:
            axis.set(xscale="log", yscale="log")
        if level is not None:
            axis.axhline(level, color="0.3", linewidth=1)
        axis.set(xlabel=x, ylabel=y)
        ticks = sorted({p[0] for points in lines.values() for p in points})
        if log and len(ticks) <= 6:
            axis.set_xticks(ticks, [f"{t:.2g}" if t < 1 else f"{t:g}" for t in ticks])
            axis.minorticks_off()
        if log:
            axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.grid(color="0.9", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, fontsize=10, frameon=False)
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            target, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    # the page scales it; ids of several figures on one page must not meet
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    prefix = f"f{zlib.crc32(repr((y, lines)).encode())}"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
