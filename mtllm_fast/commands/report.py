"""mtllm report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Report:
    """Benchmark results as Markdown, as one HTML page, as the README's table; and what changed between two runs.

    Example: mtllm report bench.json --html bench.html --against bench-of-last-week.json
    """

    results: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Result files of `mtllm bench --json`."""
    markdown: str = ""
    """The .md file to write; printed where neither this nor --html nor --readme is given."""
    html: str = ""
    """The .html file to write: one page, with figures, that loads nothing from outside."""
    readme: str = ""
    """A README whose table between <!-- bench:begin --> and <!-- bench:end --> is replaced."""
    against: str = ""
    """Older results; changes beyond noise are flagged, and something slower gives exit code 1."""
    profile: str = ""
    """A file of `mtllm profile --json`, for the HTML page."""

    def run(self) -> None:
        from .evidence import benchmarks
        from .files import check_written

        throughput = benchmarks("report.throughput")
        if not self.results:
            raise ValueError("results: name at least one result file of `mtllm bench --json`")
        check_written(self, "markdown", "html")
        records = throughput.read_results(self.results)
        changes = throughput.compare(throughput.read_results([self.against]), records) if self.against else []
        profile = None
        if self.profile:
            try:
                profile = json.loads(Path(self.profile).read_text(encoding="utf-8"))
                profile["medians"].values()
            except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"--profile {self.profile}: not a file of `mtllm profile --json`: {error}") from None
        text = throughput.to_markdown(records, changes)
        if self.readme:  # first, since it is refused where it has no place for the table
            benchmarks("report.readme").write_readme(Path(self.readme), self.results)
        if self.markdown:
            Path(self.markdown).write_text(text, encoding="utf-8")
        if self.html:
            page = benchmarks("report.html").to_html(records, changes, profile)
            Path(self.html).write_text(page, encoding="utf-8")
        written = [path for path in (self.markdown, self.html, self.readme) if path]
        print(f"written: {', '.join(written)}" if written else text)
        if worse := throughput.regressions(changes):
            print("worse beyond noise:\n  " + "\n  ".join(worse))
            raise SystemExit(1)
