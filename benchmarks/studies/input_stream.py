"""Gigabytes of JSONL through tokenise + pack: flat memory, and every document once over the ranks, also after a resume.

    python -m benchmarks.studies.input_stream --gigabytes 2 --json benchmarks/results/cpu/input_stream.json

Every rank is a process of its own with its own loader processes. It stops in the middle, and a new process goes on from
what the old one left in a file, as a training run does from a checkpoint. The verdict needs
- every document's id exactly once over all ranks, batches before and after the resume counted together,
- proportional memory (PSS) of the ranks' process trees, which over the second half of each part grows by at most
  `GROWTH` of itself,
- no window of the second part tokenised that lies before its first batch.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .. import REPO
from ..common import parser_of, percentile, study_record, write

GROWTH = 0.05  # of the memory, from the third quarter of a part to its last
TOKENS, SHUFFLE, MAX_LENGTH = 4096, 1000, 512
_SYLLABLES = "ba ri te lo mu she ka vo én is qua dü pra ni go et s or a in"


@dataclass(frozen=True)
class Verdict:
    """What was found; `problems` is empty where everything holds."""

    problems: tuple[str, ...]
    growth: tuple[float, ...]  # of each part: share by which its last quarter lies above its third


# ---- the text


def word_pool(words: int, seed: int = 0) -> str:
    """Running text of made-up words whose frequencies fall as 1 / rank, the frequent ones short."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.log10(np.arange(1, 20_001)) - 1 + rng.normal(0, 0.5, 20_000), 1, 4).round().astype(int)
    vocabulary = ["".join(rng.choice(_SYLLABLES.split(), length)) for length in lengths]
    shares = 1 / np.arange(1, len(vocabulary) + 1)
    return " ".join(vocabulary[i] for i in rng.choice(len(vocabulary), words, p=shares / shares.sum()))


def write_shards(folder: Path, size: int, shards: int, pool: str) -> int:
    """Write `size` bytes of documents {"id", "text"}, numbered through, and return how many.

    Lengths are log-normal like those of web text: median 1,700 characters, mean about 2,800.
    """
    rng = random.Random(1)
    number = 0
    for shard in range(shards):
        written = 0
        with (folder / f"part-{shard:03d}.jsonl").open("w", encoding="utf-8") as file:
            while written < size // shards:
                length = min(200_000, max(60, int(rng.lognormvariate(7.44, 1.0))))
                start = rng.randrange(len(pool) - 1)
                text = pool[start : start + length] if start + length <= len(pool) else pool[:length]
                written += file.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")
                number += 1
    return number


def save_tokenizers(folder: Path, pool: str) -> None:
    from mtllm_fast.data import StackTokenizer
    from tests.tiny import llm_tokenizer, nllb_tokenizer

    lines = [pool[i : i + 200] for i in range(0, min(len(pool), 400_000), 200)]
    tokenizer = StackTokenizer(
        nllb_tokenizer(lines, 4000), llm_tokenizer(lines, 4000), max_mt_tokens=MAX_LENGTH, max_llm_tokens=MAX_LENGTH
    )
    tokenizer.save_pretrained(folder / "tokenizers")


# ---- one rank


def run_rank(folder: Path, rank: int, ranks: int, workers: int, lookahead: int, first: int, stop: int | None) -> None:
    """Batches `first` to `stop` of one rank: their ids to a file, the place of `stop` to another."""
    from mtllm_fast.data import PackedDataset, PackedLoader, StackTokenizer, read_rows

    dataset = PackedDataset(
        read_rows(folder / "text", id_column="id"),
        StackTokenizer.from_pretrained(folder / "tokenizers"),
        max_tokens=TOKENS,
        lookahead=lookahead,
        shuffle_buffer=SHUFFLE,
        rank=rank,
        world_size=ranks,
    )
    place = folder / f"place-{rank}.json"
    after = json.loads(place.read_text()) if first else None
    dataset.set_epoch(0, first, after)
    began, seen, first_batch_s = time.perf_counter(), 0, 0.0
    number, filled = first, {"mt": 0, "llm": 0}
    with (folder / f"ids-{rank}-{first}.bin").open("wb") as ids, (folder / f"rows-{rank}").open("w") as progress:
        for batch in PackedLoader(dataset, workers):
            first_batch_s = first_batch_s or time.perf_counter() - began
            if batch.weight:
                np.array([int(name) for name in batch.ids if name is not None], np.int64).tofile(ids)
                seen += batch.num_rows
                for side in filled:
                    filled[side] += batch.side(side).num_tokens
            number += 1
            progress.seek(0)
            progress.write(f"{number:12d}")
            progress.flush()
            if number == stop:
                break
    if number == stop:
        place.write_text(json.dumps(dataset.read_before(number)))
    counts = dataset.counters
    about = {
        "batches": number - first,
        "rows": seen,
        "seconds": time.perf_counter() - began,
        "first_batch_s": first_batch_s,
        "windows_before": after["windows"] if after else 0,
        "windows": counts.windows,
        "packs": counts.packs,
        "tokens": dict(counts.tokens),
        "budget": counts.budget,
        "filled": filled,
    }
    (folder / f"about-{rank}-{first}.json").write_text(json.dumps(about))


# ---- all of them, watched


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for process in found:
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def pss_mib(pids: Sequence[int]) -> float:
    """Memory of processes, what they share counted once."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return total / 1024


def run_part(folder: Path, ranks: int, workers: int, lookahead: int, first: int, stop: int | None) -> list[float]:
    """All ranks from batch `first` to `stop`; memory of their trees, sampled while every rank makes batches."""
    command = [sys.executable, "-m", "benchmarks.studies.input_stream", "--folder", str(folder), "--ranks", str(ranks)]
    command += ["--workers", str(workers), "--lookahead", str(lookahead), "--first", str(first)]
    command += ["--stop", str(stop)] if stop else []
    processes = [subprocess.Popen([*command, "--rank", str(rank)], cwd=REPO) for rank in range(ranks)]
    samples: list[float] = []
    memory = 0.0
    for rank in range(ranks):
        (folder / f"rows-{rank}").unlink(missing_ok=True)
    while all(process.poll() is None for process in processes):
        try:
            started = all((folder / f"rows-{rank}").read_text().strip() for rank in range(ranks))
        except FileNotFoundError:
            started = False
        memory = sum(pss_mib(tree(process.pid)) for process in processes)
        if started and all(process.poll() is None for process in processes):
            samples.append(memory)
        time.sleep(min(1.0, 0.05 * (1 + len(samples))))  # reading the memory of a process costs it milliseconds
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"a rank failed: exit codes {codes}")
    return samples or [memory]


def growth(samples: Sequence[float]) -> float:
    """Share by which memory in the last quarter of the samples lies above that in the third."""
    quarter = max(len(samples) // 4, 1)
    before, last = samples[-2 * quarter : -quarter] or samples, samples[-quarter:]
    return percentile(last, 0.5) / percentile(before, 0.5) - 1


def judge(count: int, ids: np.ndarray, parts: Sequence[Sequence[float]]) -> Verdict:
    """The verdict on what was read: ids of all ranks and parts, and each part's memory."""
    times = np.bincount(ids, minlength=count)
    problems = [
        f"{int(wrong.sum())} documents {what}, the first is {int(np.flatnonzero(wrong)[0])}"
        for what, wrong in (("missing", times[:count] == 0), ("more than once", times > 1))
        if wrong.any()
    ]
    if len(times) > count:
        problems.append(f"ids up to {len(times) - 1}, but there are {count} documents")
    grown = tuple(growth(samples) for samples in parts)
    problems += [
        f"memory of part {part} grows by {100 * share:.1f} % in its second half"
        for part, share in enumerate(grown, 1)
        if share > GROWTH
    ]
    return Verdict(tuple(problems), grown)


def estimated_packs(folder: Path, count: int, lookahead: int) -> int:
    """Packs of the epoch, from the first window."""
    from mtllm_fast.data import PackedDataset, StackTokenizer, read_rows

    rows = list(islice(read_rows(folder / "text"), lookahead))
    tokenizer = StackTokenizer.from_pretrained(folder / "tokenizers")
    dataset = PackedDataset(rows, tokenizer, max_tokens=TOKENS, lookahead=lookahead, align=False)
    return round(len(list(dataset)) * count / len(rows))


def main(argv: list[str] | None = None) -> int:
    """Run, print the verdict, write; 1 when it fails."""
    parser = parser_of("benchmarks.studies.input_stream", __doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each rank")
    parser.add_argument("--lookahead", type=int, default=1024, help="rows of a window")
    parser.add_argument("--shards", type=int, default=8)
    for internal in ("--folder", "--rank", "--first", "--stop"):
        parser.add_argument(internal, type=Path if internal == "--folder" else int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.folder is not None:
        where = (options.folder, options.rank, options.ranks, options.workers, options.lookahead)
        run_rank(*where, options.first, options.stop)
        return 0
    with tempfile.TemporaryDirectory(prefix="input-stream-") as name:
        folder = Path(name)
        sizes = (options.gigabytes, options.ranks, options.workers, options.lookahead, options.shards)
        record, problems = measure(folder, *sizes)
    print("\n".join([*problems, "FAIL"] if problems else ["PASS"]))
    if options.json:
        write(options.json, [record])
    return 1 if problems else 0


def measure(
    folder: Path, gigabytes: float, ranks: int, workers: int, lookahead: int, shards: int
) -> tuple[dict[str, Any], list[str]]:
    """(the record, what is wrong)"""
    text = folder / "text"
    text.mkdir()
    pool = word_pool(1_000_000)
    count = write_shards(text, round(gigabytes * 1e9), shards, pool)
    size = sum(file.stat().st_size for file in text.iterdir())
    save_tokenizers(folder, pool)
    stop = max(estimated_packs(folder, count, lookahead) // (2 * ranks), 1)
    print(f"{size:,} bytes, {count:,} documents; {ranks} ranks x {workers} workers stop at batch {stop:,}", flush=True)
    began = time.perf_counter()
    parts, problems = [], []
    for first, until in ((0, stop), (stop, None)):
        parts.append(run_part(folder, ranks, workers, lookahead, first, until))
    seconds = time.perf_counter() - began
    ids = np.concatenate([np.fromfile(file, np.int64) for file in sorted(folder.glob("ids-*.bin"))])
    about = [[json.loads((folder / f"about-{r}-{f}.json").read_text()) for r in range(ranks)] for f in (0, stop)]
    verdict = judge(count, ids, parts)
    problems += verdict.problems
    if any(rank["windows_before"] == 0 for rank in about[1]):
        problems.append("the second part began at the first window")
    last = about[1][0]
    sides = {side: tokens / last["budget"] for side, tokens in last["tokens"].items()}
    for number, (samples, found, grown) in enumerate(zip(parts, about, verdict.growth, strict=True), 1):
        print(
            f"part {number}: {sum(rank['rows'] for rank in found):,} documents, memory of all processes "
            f"{percentile(samples, 0.5):.0f} MiB, peak {max(samples):.0f}, second half {100 * grown:+.1f} %, "
            f"first batch after {max(rank['first_batch_s'] for rank in found):.1f} s"
        )
    print(
        f"{seconds:.0f} s, {count / seconds:,.0f} documents/s, {size / seconds / 1e6:.2f} MB/s (every rank tokenises "
        f"all); budget used: {', '.join(f'{100 * share:.1f} % {side}' for side, share in sides.items())}"
    )
    found = {
        "time_ms": seconds * 1e3,
        "problems": problems,
        "stop_batch": stop,
        "tokens": TOKENS,
        "lookahead": lookahead,
        "documents_read": len(ids),
        "packing": sides,
        "growth_bound": GROWTH,
        "parts": [
            {"memory_mib": {"quarters": quarters(samples), "peak": max(samples), "growth": grown}, "ranks": ranks_}
            for samples, grown, ranks_ in zip(parts, verdict.growth, about, strict=True)
        ],
    }
    shape = {"bytes": size, "N": count, "ranks": ranks, "workers": workers}
    return study_record("input stream", shape, not problems, "int64", **found), problems


def quarters(samples: Sequence[float]) -> list[float]:
    """Median of each quarter."""
    edges = [round(len(samples) * k / 4) for k in range(5)]
    return [percentile(samples[a:b] or samples, 0.5) for a, b in pairwise(edges)]


if __name__ == "__main__":
    sys.exit(main())
