"""Throughput reports: speed-ups, comparison of two runs, Markdown, the page, the README's table and its staleness."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.common import Record, write
from benchmarks.report import readme as readme_table
from benchmarks.report import throughput
from benchmarks.report.html import to_html
from benchmarks.sources import sources_hash
from mtllm_fast import cli
from tests.conftest import REPO

SOURCES = ("kernels/gemms.py",)
CEILINGS = {"copy": 1e10, "gemm_fp32": 2e11, "gemm_fp32_torch": 1e11, "gemm_fp32_onednn": 2e11, "gemm_bf16": 4e11}


def record(case: str, variant: str, times: list[float], size: str = "NLI", **changes) -> Record:
    ordered = sorted(times) or [None]
    made = Record(
        case, {"B": 4, "T": 100, "L": 50}, "fp32", "a cpu", variant, "pass", size=size, ours=variant.startswith("ours"),
        time_ms=ordered[len(times) // 2], time_ms_p20=ordered[0], time_ms_p80=ordered[-1], round_ms=times,
        peak_incremental_mib=10.0, floor_ms=1.0, gate_detail={"loss": 1e-7}, ceilings=CEILINGS, commit="abc",
        versions={"torch": "2"}, source_files=SOURCES, sources=sources_hash(SOURCES),
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def records() -> list[Record]:
    found = [
        record("adaptation_step", "ours", [10, 11, 12], "NLI, KL"),
        record("adaptation_step", "packed, unfused", [12, 13, 14], "NLI, KL"),
        record("adaptation_step", "padded, 4-D mask", [20, 22, 24], "NLI, KL", peak_incremental_mib=40.0),
        record("lora", "peft", [1.0, 1.1, 1.2], "x"),
        record("lora", "ours, slow", [2.0, 2.2, 2.4], "x"),
        record("pooled_mse", "ours", [3.0, 3.0, 3.0]),
        record("pooled_mse", "padded", [2.9, 3.1, 3.0]),
        record("paired_mse", "ours", [], gate="fail"),
        record("paired_mse", "padded", [1, 1, 1]),
    ]
    for rows, share in ((256, 1.0), (512, 2.0), (1024, 4.0)):
        for variant, factor in (("ours", 1.0), ("unfused", 2.0)):
            shape = {"T": rows, "D": 8, "V": 16}
            found.append(record("linear_kl", variant, [factor * share] * 3, f"{rows}x8x16", shape=shape))
    found += [
        record("kl_accuracy", name, [], f"KL {kl}", kl=kl, gate_detail={"gradient": 0.001 / kl})
        for name in ("ours difference", "unfused bf16")
        for kl in (0.1, 0.01, 0.001)
    ]
    return found


def test_speedups_are_ratios_within_rounds_and_losing_cases_show(records) -> None:
    found = {(s.ours.case, s.other.variant): s for s in throughput.speedups(records)}
    assert ("paired_mse", "padded") not in found  # its gate is red
    step = found["adaptation_step", "padded, 4-D mask"]
    assert (step.middle, step.memory, step.verdict) == (2.0, 0.25, "faster")
    assert found["lora", "peft"].verdict == "slower"
    assert found["lora", "peft"].middle == pytest.approx(0.5)
    assert found["pooled_mse", "padded"].verdict == "even"
    text = throughput.to_markdown(records)
    assert "RED" in text
    assert "Wrong results, so no speed: paired_mse NLI ours" in text
    assert "| lora | x | peft | 0.50 |" in text
    assert "2.0 times" in text  # what the GEMM library contributes
    assert "KL 0.001" in text


def test_a_change_counts_only_beyond_noise(records) -> None:
    old = records
    slower = replace(old[0], time_ms=15.0, time_ms_p20=14.0, time_ms_p80=16.0)
    noisy = replace(old[1], time_ms=16.0, time_ms_p20=13.0, time_ms_p80=17.0)  # +23 %, but the intervals meet
    hungry = replace(old[2], peak_incremental_mib=60.0)
    broken = replace(old[5], gate="fail", time_ms=None)
    changes = throughput.compare(old, [slower, noisy, hungry, broken])
    assert [c.verdict for c in changes] == ["SLOWER", "", "MORE MEMORY", "BROKEN"]
    assert len(throughput.regressions(changes)) == 3
    _, rows = throughput.change_table(changes)
    assert rows[-1][-1] == ""
    faster = replace(old[0], time_ms=5.0, time_ms_p20=4.0, time_ms_p80=6.0)
    assert throughput.regressions(throughput.compare(old, [faster])) == []
    with pytest.raises(ValueError, match="no measurement in common"):
        throughput.compare(old, [replace(old[0], device="another")])


def test_the_page_loads_nothing_and_shows_every_figure(records) -> None:
    profile = {"mode": "adapt", "device": "cpu", "medians": {"encoder": 0.1, "loss": 0.3}}
    page = to_html(records, throughput.compare(records, records[:3]), profile)
    allowed = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names, which no browser loads
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) <= allowed
    assert not re.search(r"<script|<link|@import|src=", page)
    assert page.count("<svg") == 3  # time and memory against rows, error against KL
    for text in ("adaptation_step", "2.00 ×", "slower", "gate green", "75.0 %", "of the floor"):
        assert text in page
    identifiers = re.findall(r'id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert page == to_html(records, throughput.compare(records, records[:3]), profile)


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path, records) -> Path:
    """A repository whose README shows a table of results measured at its first commit."""
    _git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "README.md").write_text("# Title\n\n<!-- bench:begin -->\n<!-- bench:end -->\n\nMore.\n")
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-q", "-m", "one")
    head = _git(tmp_path, "rev-parse", "--short=10", "HEAD")
    write(tmp_path / "bench.json", [replace(r, commit=head) for r in records])
    cli.main(["report", str(tmp_path / "bench.json"), "--readme", str(tmp_path / "README.md")])
    _git(tmp_path, "add", "-A")
    _git(tmp_path, "commit", "-q", "-m", "two")
    return tmp_path


def test_the_readme_table_is_fresh_until_something_that_matters_changes(repository, monkeypatch) -> None:
    readme = repository / "README.md"
    text = readme.read_text()
    assert "| adaptation_step | NLI, KL | padded, 4-D mask | 2.00 x |" in text
    assert "Slower: lora against peft (x 0.50 x)." in text
    assert text.startswith("# Title")
    assert text.endswith("More.\n")
    (repository / "other.txt").write_text("a commit that changes no measured code")
    _git(repository, "add", "-A")
    _git(repository, "commit", "-q", "-m", "three")
    assert readme_table.stale(readme) == []

    readme.write_text(text.replace("2.00 x", "3.00 x"))
    assert "not what its result files give" in readme_table.stale(readme)[0]
    readme.write_text(text)

    monkeypatch.setattr(readme_table, "sources_hash", lambda patterns: "other")
    assert any("kernels/gemms.py changed" in reason for reason in readme_table.stale(readme))


def test_results_of_another_commit_make_the_table_stale(repository) -> None:
    readme, results = repository / "README.md", repository / "bench.json"
    _git(repository, "checkout", "-q", "--orphan", "elsewhere")
    _git(repository, "commit", "-q", "-m", "unrelated", "--allow-empty")
    foreign = _git(repository, "rev-parse", "--short=10", "HEAD")
    _git(repository, "checkout", "-q", "main")
    for commit in (foreign, "0123456789", ""):
        rows = [{**row, "commit": commit} for row in json.loads(results.read_text())]
        results.write_text(json.dumps(rows))
        cli.main(["report", str(results), "--readme", str(readme)])
        reasons = readme_table.stale(readme)
        assert reasons
        assert all("not in this history" in reason for reason in reasons)
    results.unlink()
    assert "no such file" in readme_table.stale(readme)[0]


def test_this_readme_is_up_to_date() -> None:
    assert readme_table.stale(REPO / "docs" / "results.md") == []


def test_the_command(tmp_path, records, capsys) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    write(new, records)
    write(old, [asdict(records[1]), asdict(replace(records[0], time_ms=5.0, time_ms_p20=4.9, time_ms_p80=5.1))])
    cli.main(["report", str(new), "--html", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")])
    assert (tmp_path / "r.html").stat().st_size > 10_000
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(new), "--against", str(old)])
    assert caught.value.code == 1
    assert "adaptation_step NLI, KL ours: SLOWER" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "plain.md").write_text("no markers")
    for arguments, message in (
        ([], "at least one result file"),
        ([str(tmp_path / "none.json")], "no such file"),
        ([str(tmp_path / "bad.json")], "hold no records"),
        ([str(new), "--profile", str(new)], "not a file of `mtllm profile"),
        ([str(new), "--readme", str(tmp_path / "plain.md")], "bench:begin"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["report", *arguments])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
