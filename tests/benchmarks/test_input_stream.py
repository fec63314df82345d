"""The stream benchmark in short, and that its verdict can fail."""

from __future__ import annotations

import numpy as np

from benchmarks.studies import input_stream


def test_a_short_run_reads_every_document_once_over_ranks_and_a_resume(tmp_path) -> None:
    record, problems = input_stream.measure(tmp_path, 0.002, ranks=2, workers=1, lookahead=128, shards=3)
    assert not [problem for problem in problems if "memory" not in problem]  # of seconds, memory tells nothing
    assert record["documents_read"] == record["shape"]["N"] > 500
    first, second = ([rank["rows"] for rank in part["ranks"]] for part in record["parts"])
    assert min(first + second) > 50
    assert sum(first + second) == record["shape"]["N"]
    assert all(rank["windows_before"] > 0 for rank in record["parts"][1]["ranks"])
    assert min(record["packing"].values()) > 0.9


def test_what_fails() -> None:
    ids, flat = np.arange(1000), [[500.0 + k % 7 for k in range(200)]] * 2
    assert input_stream.judge(1000, ids, flat).problems == ()
    (missing,) = input_stream.judge(1000, ids[ids != 17], flat).problems
    assert missing == "1 documents missing, the first is 17"
    (twice,) = input_stream.judge(1000, np.append(ids, 4), flat).problems
    assert twice == "1 documents more than once, the first is 4"
    assert len(input_stream.judge(999, ids, flat).problems) == 1
    leak = [500.0 + k for k in range(200)]
    assert "part 2 grows by" in input_stream.judge(1000, ids, [flat[0], leak]).problems[0]
