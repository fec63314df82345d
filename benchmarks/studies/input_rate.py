"""What the input pipeline gives per core, by stage, and how full its packs are.

    python -m benchmarks.studies.input_rate --json benchmarks/results/cpu/input_rate.json

Texts: "web text" is made up, with the lengths of web documents (median 1,700 characters, mean 2,800); "NLI" (pairs)
and "sentences" are MNLI and SIB-200 where that data is present (see `lengths`). Tokenizers: BPE trained here on those
texts, NLLB's way of splitting and Llama 3's, 16,000 entries; at most 512 tokens a row on each side.

Stages are timed in one process with one thread, on 1,024 rows: `read` (JSONL to rows), `mt` and `llm` (tokens and their
ends), `pack`, `collate` (tensors and aligned rows). `loader` is all of it, from JSONL text or from a token store, with
0, 1 or 2 loader processes, worker start included. Packing counts, on each side, the tokens in all packs over packs x
budget, the last pack of every window included; "fuller" is the side with more.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import DATA
from ..common import made_here, parser_of, percentile, timed_once, write
from ..lengths import nli_texts, sib200
from .input_stream import word_pool

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BUDGETS = (4096, 8192, 16384)
WANTED, GPUS = 30, 8  # documents/s of one H100, and how many of them share a stream
SENTENCES = ("eng_Latn", "deu_Latn", "swh_Latn", "fra_Latn", "spa_Latn")


def texts(web_rows: int) -> dict[str, list[Any]]:
    """Rows by kind of text; kinds whose data is absent are left out."""
    from mtllm_fast.data import TextRow

    rng, pool = random.Random(1), word_pool(400_000)
    web = []
    for number in range(web_rows):
        length = min(100_000, max(60, int(rng.lognormvariate(7.44, 1.0))))
        start = rng.randrange(len(pool) - length)
        web.append(TextRow(pool[start : start + length], id=str(number)))
    found = {"web text": web}
    if pairs := nli_texts():
        found["NLI"] = [TextRow(a, text_pair=b, id=str(i)) for i, (a, b) in enumerate(pairs)]
    if (DATA / "sib200").is_dir():
        sentences = [text for text, _ in sib200(SENTENCES, ("train", "dev", "test"))]
        random.Random(2).shuffle(sentences)
        found["sentences"] = [TextRow(text, id=str(i)) for i, text in enumerate(sentences)]
    return found


def make_tokenizer(kinds: dict[str, list[Any]], size: int) -> Any:
    """Both tokenizers, trained on up to 1,500 rows of every kind."""
    from tokenizers import Regex, pre_tokenizers

    from mtllm_fast.data import StackTokenizer
    from tests.tiny import llm_tokenizer, nllb_tokenizer

    lines = [row.text[:400] for rows in kinds.values() for row in rows[:1500]]
    llm = llm_tokenizer(lines, size)
    llm.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return StackTokenizer(nllb_tokenizer(lines, size), llm)


def milliseconds_of(run: Callable[[], Any], repeats: int) -> list[float]:
    run()
    return [timed_once(run, "cpu") for _ in range(repeats)]


def record_of(case: str, kind: str, variant: str, rows: int, tokens: int, **found: Any) -> dict[str, Any]:
    about = {"case": case, "shape": {"N": rows, "tokens": tokens}, "dtype": "int64", "variant": variant}
    return {**about, "gate": "none", "text": kind, **found}


def entry(kind: str, stage: str, rows: int, tokens: int, round_ms: Sequence[float], **more: Any) -> dict[str, Any]:
    time_ms = percentile(round_ms, 0.5)
    rates = {"rows_per_s": 1e3 * rows / time_ms, "tokens_per_s": 1e3 * tokens / time_ms}
    times = {"time_ms": time_ms, "round_ms": round_ms}
    return record_of("input rate", kind, stage, rows, tokens, **times, **rates, **more)


def stages(kind: str, rows: list[Any], tokenizer: Any, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Every stage by itself, in this process."""
    from mtllm_fast.data import read_rows, token_budget_packs
    from mtllm_fast.data.batch import tokenise_rows

    path = write_rows(folder, rows)
    made = tokenise_rows(rows, tokenizer, ("mt", "llm"))
    costs = made.costs()
    packs = token_budget_packs(costs, BUDGETS[0])
    mt, llm = (sum(cost[side] for cost in costs) for side in (0, 1))
    pair = {"pair_column": "pair"} if rows[0].text_pair is not None else {}
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "read": (0, lambda: sum(1 for _ in read_rows(path, id_column="id", **pair))),
        "mt": (mt, lambda: tokenizer.mt_side(rows)),
        "llm": (llm, lambda: tokenizer.llm_side(rows)),
        "pack": (mt + llm, lambda: token_budget_packs(costs, BUDGETS[0])),
        "collate": (mt + llm, lambda: [made.batch(pack, True) for pack in packs]),
    }
    return [
        entry(kind, stage, len(rows), tokens, milliseconds_of(run, repeats)) for stage, (tokens, run) in runs.items()
    ]


def write_rows(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            data = {"id": row.id, "text": row.text} | ({"pair": row.text_pair} if row.text_pair is not None else {})
            file.write(json.dumps(data, ensure_ascii=False) + "\n")
    return path


def loaders(kind: str, rows: list[Any], tokenizer: Any, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """The whole pipeline, from text and from a store, with 0, 1 and 2 loader processes."""
    from mtllm_fast.data import PackedDataset, PackedLoader, read_rows
    from mtllm_fast.data.store import TokenStore, write_store

    path = write_rows(folder, rows)
    write_store(read_rows(path, id_column="id"), tokenizer, folder / "store")
    sources = {"text": read_rows(path, id_column="id"), "store": TokenStore(folder / "store")}
    records = []
    for source, stream in sources.items():
        for workers in (0, 1, 2):
            dataset = PackedDataset(stream, tokenizer, max_tokens=BUDGETS[0], lookahead=1024)

            def run(dataset: Any = dataset, workers: int = workers) -> None:
                for _ in PackedLoader(dataset, workers):
                    pass

            times = milliseconds_of(run, repeats)
            tokens = sum(dataset.counters.tokens.values())
            records.append(entry(kind, f"loader from {source}", len(rows), tokens, times, workers=workers))
    return records


def packing(kind: str, rows: list[Any], tokenizer: Any) -> list[dict[str, Any]]:
    """Share of the budget that is filled, with windows of 1,024 rows and with those that are the default."""
    from mtllm_fast.data import PackedDataset

    records = []
    for budget in BUDGETS:
        for lookahead in (1024, None):
            dataset = PackedDataset(rows, tokenizer, max_tokens=budget, lookahead=lookahead, align=False)
            for _ in dataset:
                pass
            counts = dataset.counters
            shares = {side: tokens / counts.budget for side, tokens in counts.tokens.items()}
            found = {"packs": counts.packs, "window_rows": dataset.window_rows(), "windows": counts.windows}
            found |= {"share": shares, "fuller": counts.efficiency}
            variant = "default" if lookahead is None else "1024 rows"
            records.append(record_of("packing", kind, variant, len(rows), budget, **found))
    return records


def verdict(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the rates mean for GPUs, in words."""
    lines = []
    for record in records:
        if record["text"] == "web text" and record["variant"] == "loader from text" and record["workers"] == 1:
            rate = record["rows_per_s"]
            lines.append(
                f"web text, one loader process: {rate:,.0f} documents/s. A GPU at {WANTED} documents/s needs "
                f"{WANTED / rate:.0%} of it; with {GPUS} GPUs every rank tokenises the whole stream of "
                f"{WANTED * GPUS} documents/s: {WANTED * GPUS / rate:.1f} loader processes per GPU; from a token store "
                "each rank reads its own batches alone"
            )
    defaults = [r for r in records if r["case"] == "packing" and r["variant"] == "default"]
    worst = min(defaults, key=lambda r: r["fuller"])
    lines.append(
        f"packing, default windows: at least {worst['fuller']:.1%} of the budget on the fuller side "
        f"({worst['text']} at {worst['shape']['tokens']:,} tokens, {worst['packs']} packs)"
    )
    return lines


def measure(web_rows: int, repeats: int, vocabulary: int = 16_000) -> list[dict[str, Any]]:
    """All records."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    kinds = texts(web_rows)
    tokenizer = make_tokenizer(kinds, vocabulary)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="input-rate-") as name:
        for kind, rows in kinds.items():
            records += stages(kind, rows[:1024], tokenizer, Path(name), repeats)
            print(f"{kind}: stages done", flush=True)
            records += packing(kind, rows, tokenizer)
            print(f"{kind}: packing done", flush=True)
        records += loaders("web text", kinds["web text"], tokenizer, Path(name), repeats)
    return [record | made_here() for record in records]


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 where packs are filled to less than 97 %."""
    parser = parser_of("benchmarks.studies.input_rate", __doc__)
    parser.add_argument("--rows", type=int, default=6144, help="documents of web text")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    records = measure(options.rows, options.repeats)
    for r in records:
        if r["case"] == "packing":
            shares = ", ".join(f"{share:.1%} {side}" for side, share in r["share"].items())
            print(
                f"{r['text']:10} packs of {r['shape']['tokens']:6,}, windows of {r['window_rows']:6,} rows: {shares} "
                f"({r['packs']} packs)"
            )
        else:
            workers = f", {r['workers']} workers" if "workers" in r else ""
            rates = f"{r['rows_per_s']:9,.0f} rows/s {r['tokens_per_s']:12,.0f} tokens/s"
            print(f"{r['text']:10} {r['variant'] + workers:28} {rates}")
    print("\n".join(verdict(records)))
    if options.json:
        write(options.json, records)
    low = [r for r in records if r["case"] == "packing" and r["variant"] == "default" and r["fuller"] < 0.97]
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
