"""Engine.encode against the ordinary padded Hugging Face loop, on texts of real lengths.

    python -m benchmarks.cases.encode --device cpu --json benchmarks/results/cpu/encode.json

A small NLLB encoder and Llama (4 + 4 layers, width 512, random weights), the same weights, dtype and threads on every
side, tokenisation included:

    ours          Engine.encode
    ours-packing  the same with torch's own linear layers, as in the loops: what packing alone gives (CPU)
    padded        batches of 32 texts as they come: tokenizer with padding, encoder, projection, LLM under the 4-D mask
                  that transformers makes, mean over real tokens
    sorted        the same, with the texts sorted by their number of tokens first

A variant whose embeddings miss the padded loop's in fp32 by more than the gate gets no time; the control that the gate
must fail is the loop that lets the LLM see its padding.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from mtllm_fast.data import StackTokenizer
from mtllm_fast.inference import Engine
from mtllm_fast.models import MTLLM
from tests.tiny import nllb_tokenizer

from .. import DATA
from ..apart import apart
from ..common import (
    DTYPES,
    Record,
    interleaved,
    parser_of,
    peak_incremental_mib,
    percentile,
    record_here,
    relative_error,
    write,
)
from ..lengths import sib200, swahili_xnli
from ..models import llama, m2m100

GATE = {"fp32": 1e-4, "bf16": 3e-2}
BATCH, WIDTH, LAYERS, HEADS, LIMIT = 32, 512, 4, 8, 512


def sentences(count: int) -> tuple[list[str], list[str]]:
    """Of four languages, mixed."""
    rows = sib200(("swh_Latn", "hau_Latn", "eng_Latn", "deu_Latn"), ("train", "dev", "test"))
    random.Random(0).shuffle(rows)
    texts, codes = zip(*rows[:count])
    return list(texts), list(codes)


def xnli(count: int) -> tuple[list[str], list[str]]:
    """Swahili premises, each followed by its hypothesis."""
    rows = swahili_xnli()
    random.Random(0).shuffle(rows)
    return [f"{premise} {hypothesis}" for premise, hypothesis in rows[:count]], ["swh_Latn"] * count


def synthetic(count: int) -> tuple[list[str], list[str]]:
    """Random words, log-normal numbers of them: the lengths of sentences without any data."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=max(2, round(rng.lognormvariate(2.8, 0.6))))) for _ in range(count)]
    return texts, [rng.choice(("eng_Latn", "swh_Latn")) for _ in texts]


def sources() -> dict[str, Callable[[int], tuple[list[str], list[str]]]]:
    """Texts by name; data sets only where they are present."""
    found: dict[str, Callable[[int], tuple[list[str], list[str]]]] = {}
    if (DATA / "xnli" / "sw").is_dir():
        found["xnli"] = xnli
    if (DATA / "sib200").is_dir():
        found["sib200"] = sentences
    return found or {"synthetic": synthetic}


@dataclass
class Problem:
    """The texts, our model, and its weights in Hugging Face modules as they come."""

    texts: list[str]
    codes: list[str]
    model: MTLLM
    encoder: Any
    llm: Any
    device: str

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer.mt  # type: ignore[union-attr]

    def lengths(self) -> list[int]:
        ids = self.tokenizer(self.texts, truncation=True, max_length=LIMIT)["input_ids"]
        return [len(i) for i in ids]


def make_problem(source: str, count: int, dtype: str, device: str) -> Problem:
    """Random models of one seed, and a tokenizer trained on the texts."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaModel
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    texts, codes = {"synthetic": synthetic, **sources()}[source](count)
    tokenizer = nllb_tokenizer(texts, vocab_size=8000)
    torch.manual_seed(0)
    e_config = m2m100(WIDTH, LAYERS, 4 * WIDTH, len(tokenizer), HEADS, dropout=0.0, max_position_embeddings=1024)
    l_config = llama(WIDTH, LAYERS, 1408, 1000, HEADS, max_position_embeddings=1024)
    stack = StackTokenizer(tokenizer, None, max_mt_tokens=LIMIT)
    model = MTLLM.stack(M2M100Encoder(e_config), LlamaForCausalLM(l_config), tokenizer=stack)
    model = model.to(device, DTYPES[dtype]).eval()
    parts = model.require_stack()
    plain: list[nn.Module] = []
    for kind, config, ours in (
        (M2M100Encoder, e_config, parts.encoder.model),
        (LlamaModel, l_config, parts.llm.decoder),
    ):
        config = type(config)(**config.to_dict())
        config._attn_implementation = "sdpa"
        theirs = kind(config).to(device).eval()
        theirs.load_state_dict(ours.state_dict(), assign=True)  # the very tensors
        plain.append(theirs)
    return Problem(texts, codes, model, plain[0], plain[1], device)


def run_ours(p: Problem) -> np.ndarray:
    return Engine(p.model).encode(p.texts, p.codes)


@torch.no_grad()
def padded_batch(p: Problem, encoded: Any, codes: list[str], blind: bool = True) -> Tensor:
    """One batch of the padded loop; `blind=False` lets the LLM see the padding."""
    from transformers.masking_utils import create_bidirectional_mask

    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    ids[:, 0] = torch.tensor(p.tokenizer.convert_tokens_to_ids(codes))  # a language per row
    ids, mask = ids.to(p.device), mask.to(p.device)
    states = p.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    embeds = p.model.projection.layers(states)  # type: ignore[union-attr]
    seen = mask if blind else torch.ones_like(mask)
    mask_4d = create_bidirectional_mask(p.llm.config, embeds, seen)
    if mask_4d is None:  # nothing is padded; without a mask the LLM would be causal
        mask_4d = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=p.device)
    hidden = p.llm(inputs_embeds=embeds, attention_mask=mask_4d, use_cache=False).last_hidden_state
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def run_padded(p: Problem, blind: bool = True) -> np.ndarray:
    out = []
    for start in range(0, len(p.texts), BATCH):
        texts, codes = p.texts[start : start + BATCH], p.codes[start : start + BATCH]
        encoded = p.tokenizer(texts, padding=True, truncation=True, max_length=LIMIT, return_tensors="pt")
        out.append(padded_batch(p, encoded, codes, blind).float().cpu())
    return torch.cat(out).numpy()


def run_sorted(p: Problem) -> np.ndarray:
    ids = p.tokenizer(p.texts, truncation=True, max_length=LIMIT)["input_ids"]
    order = sorted(range(len(ids)), key=lambda k: -len(ids[k]))
    out = torch.empty(len(ids), p.model.hidden_size)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        encoded = p.tokenizer.pad({"input_ids": [ids[k] for k in rows]}, return_tensors="pt")
        out[rows] = padded_batch(p, encoded, [p.codes[k] for k in rows]).float().cpu()
    return out.numpy()


def run_packing(p: Problem) -> np.ndarray:
    with patch("mtllm_fast.inference.engine.fast_linear", lambda device: nullcontext()):
        return run_ours(p)


RUN: dict[str, Callable[[Problem], np.ndarray]] = {
    "ours": run_ours,
    "ours-packing": run_packing,
    "padded": run_padded,
    "sorted": run_sorted,
}


def padding(variant: str, lengths: list[int]) -> float:
    """Share of the rows of every layer that are padding."""
    if variant.startswith("ours"):
        return 0.0
    if variant == "sorted":
        lengths = sorted(lengths, reverse=True)
    batches = [lengths[k : k + BATCH] for k in range(0, len(lengths), BATCH)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def memory_here(variant: str, source: str, count: int, dtype: str, device: str, threads: int) -> float:
    """Peak memory of one run beyond the model, MiB; libraries warmed up on a few texts."""
    torch.set_num_threads(threads)
    problem = make_problem(source, count, dtype, device)
    few = Problem(problem.texts[:8], problem.codes[:8], problem.model, problem.encoder, problem.llm, device)
    RUN[variant](few)
    return peak_incremental_mib(partial(RUN[variant], problem), device)


def run(
    device: str = "cpu",
    *,
    dtype: str | None = None,
    texts: int = 2000,
    repeats: int = 5,
    names: list[str] | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Record]:
    """Records of every variant on every source of texts (`names`: only these)."""
    dtype = dtype or ("fp32" if device == "cpu" else "bf16")
    records: list[Record] = []
    for source in names or list(sources()):
        problem = make_problem(source, texts, dtype, device)
        lengths = problem.lengths()
        right = run_padded(make_problem(source, texts, "fp32", device) if dtype != "fp32" else problem)
        control = run_padded(problem, blind=False)
        failing = relative_error(torch.from_numpy(control), torch.from_numpy(right))
        shape = {"N": texts, "T": sum(lengths), "L": max(lengths), "B": BATCH, "D": WIDTH}
        fresh: dict[str, Record] = {}
        for variant in RUN if device == "cpu" else [v for v in RUN if v != "ours-packing"]:
            error = relative_error(torch.from_numpy(RUN[variant](problem)), torch.from_numpy(right))
            verdict = "pass" if error <= GATE[dtype] < failing else "fail"
            record = record_here(f"encode, {source}", shape, dtype, device, variant, verdict)
            record.gate_detail = {"embeddings": error, "control": failing}
            records.append(record)
            if verdict == "pass":
                fresh[variant] = record
        times = interleaved({v: partial(RUN[v], problem) for v in fresh}, device, repeats, progress)
        for variant, record in fresh.items():
            record.timed(times[variant])
            rates = [texts / percentile(record.round_ms, q) * 1e3 for q in (0.5, 0.8, 0.2)]
            record.notes = (
                f"{rates[0]:.1f} documents/s (p20 {rates[1]:.1f}, p80 {rates[2]:.1f}); "
                f"padding {padding(variant, lengths):.3f}"
            )
            if memory:
                spec = (variant, source, texts, dtype, device, torch.get_num_threads())
                record.peak_incremental_mib = apart("spawn", memory_here, *spec)
    return records


def table(records: list[Record]) -> None:
    """Print documents/s and the ratio to the loops, of each round to its neighbour."""
    from rich.console import Console
    from rich.table import Table

    out = Table(
        "texts", "variant", "gate", "error", "ms", "p20 to p80", "documents/s", "vs ours", "padding", "peak MiB"
    )
    for r in records:
        ours = next((o for o in records if o.case == r.case and o.variant == "ours"), None)
        if r.time_ms is None or r.time_ms_p20 is None or r.time_ms_p80 is None:
            out.add_row(r.case, r.variant, r.gate, f"{r.gate_detail['embeddings']:.1e}")
            continue
        pairs = [theirs / mine for theirs, mine in zip(r.round_ms, ours.round_ms if ours else [])]
        out.add_row(
            f"{r.case} ({r.shape['N']} texts, {r.shape['T']} tokens)",
            r.variant,
            r.gate,
            f"{r.gate_detail['embeddings']:.1e}",
            f"{r.time_ms:.0f}",
            f"{r.time_ms_p20:.0f} to {r.time_ms_p80:.0f}",
            f"{r.shape['N'] / r.time_ms * 1e3:.1f}",
            f"{percentile(pairs, 0.5):.2f} x" if pairs else "",
            r.notes.rpartition("padding ")[2],
            "" if r.peak_incremental_mib is None else f"{r.peak_incremental_mib:.0f}",
        )
    Console(width=150).print(out)


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 when our embeddings fail their gate."""
    parser = parser_of("benchmarks.cases.encode", __doc__, on_device=True)
    parser.add_argument("--dtype", choices=sorted(GATE), help="default: fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--sources", nargs="+", help="xnli, sib200 or synthetic; default: the data sets that are there")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    records = run(
        options.device,
        dtype=options.dtype,
        texts=options.texts,
        repeats=options.repeats,
        names=options.sources,
        memory=not options.no_memory,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    table(records)
    if options.json:
        write(options.json, records)
    return int(any(r.gate == "fail" and r.variant == "ours" for r in records))


if __name__ == "__main__":
    sys.exit(main())
