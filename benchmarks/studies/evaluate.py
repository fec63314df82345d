"""Evaluation throughput: the packed engine against an ordinary padded loop over the same files, SIB-200 and NusaX.

    python -m benchmarks.studies.evaluate --device cpu --json benchmarks/results/cpu/evaluate.json

A stack of random weights (encoder and LLM of the given width) classifies the test rows of a few languages, from text
to logits, tokenisation included. "ours" is what `mtllm evaluate` runs: `Engine.classify`, a language at a time.
"padded" is the loop that is usually written: batches of 32 rows in file order, padded to the longest, Hugging Face's
own forward of encoder and LLM (bidirectional), masked mean, head. Both have the same weights and no adapters; neither
gets a time unless its predictions are the same and its logits agree to 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import DATA
from benchmarks.common import Record, interleaved, parser_of, peak_incremental_mib, percentile, record_here, write
from benchmarks.models import llama
from mtllm_fast.data.read import TextRow
from mtllm_fast.evaluation.tasks import TASKS
from mtllm_fast.inference import Engine
from mtllm_fast.models import MTLLM, HeadConfig
from mtllm_fast.planning import measured_peak
from tests.tiny import llm_tokenizer, m2m100_config, nllb_tokenizer

# task -> its folder, languages
FILES = {
    "sib200": ("sib200", ("eng_Latn", "deu_Latn", "swh_Latn", "quy_Latn", "tam_Taml", "zho_Hans")),
    "nusax": ("nusax_senti", ("english", "acehnese", "indonesian", "sundanese")),
}
BATCH = 32
GATE = 1e-4


def build(folder: Path, data: Path, width: int, layers: int) -> None:
    """Base models of random weights, with tokenizers of 8,000 entries trained on the languages' training texts."""
    from transformers import LlamaForCausalLM, M2M100ForConditionalGeneration

    lines = [
        row.text
        for name, (source, languages) in FILES.items()
        for code in languages
        for row in TASKS[name].rows(data / source, code, "train")
    ]
    torch.manual_seed(0)
    mt, llm = nllb_tokenizer(lines, 8000), llm_tokenizer(lines, 2000)
    encoder = M2M100ForConditionalGeneration(
        m2m100_config(
            len(mt),
            d_model=width,
            encoder_layers=layers,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=64,
            encoder_attention_heads=width // 64,
            decoder_attention_heads=width // 64,
            max_position_embeddings=512,
        )
    )
    special = {f"{name}_token_id": getattr(llm, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = llama(width, layers, 3 * width, len(llm), width // 64, max_position_embeddings=1024, **special)
    for name, model, tokenizer in (("encoder", encoder, mt), ("llm", LlamaForCausalLM(config), llm)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


class PaddedLoop:
    """The usual loop, on models loaded by Hugging Face alone, with the stack's projection and head."""

    def __init__(self, folder: Path, stack: MTLLM, device: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        assert stack.head is not None
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
        self.encoder: Any = AutoModel.from_pretrained(folder / "encoder").encoder.eval().to(device)
        self.llm: Any = AutoModel.from_pretrained(folder / "llm").eval().to(device)
        self.projection, self.head = stack.require_stack().projection.layers, stack.head.linear
        self.device = device
        self.tokens = self.padded = 0  # real and computed, since they were last reset

    @torch.no_grad()
    def classify(self, rows: list[TextRow]) -> np.ndarray:
        """Logits (N, C) of rows of one language."""
        self.tokenizer.src_lang = rows[0].language
        parts = []
        for start in range(0, len(rows), BATCH):
            texts = [row.text for row in rows[start : start + BATCH]]
            batch = self.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
            mask = batch["attention_mask"].to(self.device)
            self.tokens, self.padded = self.tokens + int(mask.sum()), self.padded + mask.numel()
            states = self.encoder(input_ids=batch["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
            embeds = self.projection(states)
            seen = torch.zeros(mask.shape, dtype=embeds.dtype, device=self.device)
            seen = seen.masked_fill(mask == 0, torch.finfo(embeds.dtype).min)[:, None, None, :]
            seen = seen.expand(-1, 1, mask.shape[1], -1)
            hidden = self.llm(inputs_embeds=embeds, attention_mask=seen, use_cache=False).last_hidden_state
            weights = mask[..., None].to(hidden.dtype)
            parts.append(self.head((hidden * weights).sum(1) / weights.sum(1)).float().cpu())
        return torch.cat(parts).numpy()


def gate(found: list[np.ndarray], expected: list[np.ndarray]) -> tuple[str, dict[str, float]]:
    """Same predictions, and logits equal to `GATE` of the largest."""
    a, b = np.concatenate(found), np.concatenate(expected)
    error = float(np.abs(a - b).max() / np.abs(b).max())
    changed = int((a.argmax(1) != b.argmax(1)).sum())
    detail = {"logits": error, "changed_predictions": float(changed)}
    return ("pass" if error <= GATE and not changed else "fail"), detail


def run_all(data: Path, device: str, width: int, layers: int, limit: int | None, repeats: int) -> list[Record]:
    """Both variants over the files of both tasks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, data, width, layers)
        torch.manual_seed(1)
        head = HeadConfig(labels=TASKS["sib200"].labels)  # as wide for both tasks: the scores do not matter here
        stack = MTLLM.stack(str(folder / "encoder"), str(folder / "llm"), head=head).eval()
        engine, loop = Engine(stack, device=device), PaddedLoop(folder, stack, device)
    records = []
    for task, (source, languages) in FILES.items():
        sets = [TASKS[task].rows(data / source, code, "test", limit=limit) for code in languages]
        records += measure(task, sets, engine, loop, {"width": width, "layers": layers}, repeats)
    return records


def peak(run: Callable[[], object], device: str) -> float:
    """MiB that a run holds at once beyond the models; on the CPU what torch's allocator gives out."""
    return measured_peak(run) / 2**20 if device == "cpu" else peak_incremental_mib(run, device)


def measure(
    task: str, sets: list[list[TextRow]], engine: Engine, loop: PaddedLoop, sizes: dict[str, int], repeats: int
) -> list[Record]:
    """Both variants over the rows of one task."""

    def all_rows(classify: Callable[[list[TextRow]], np.ndarray]) -> list[np.ndarray]:
        return [classify(rows) for rows in sets]

    variants = {"ours": partial(all_rows, engine.classify), "padded": partial(all_rows, loop.classify)}
    loop.tokens = loop.padded = 0
    results = {name: run() for name, run in variants.items()}
    verdict, detail = gate(results["ours"], results["padded"])
    count, tokens, padding = sum(map(len, sets)), loop.tokens, 1 - loop.tokens / loop.padded
    shape = {"rows": count, "tokens": tokens, "languages": len(sets), **sizes}
    records = {
        name: record_here(f"evaluate {task}", shape, "fp32", loop.device, name, verdict if name == "ours" else "none")
        for name in variants
    }
    for record in records.values():
        record.gate_detail, record.notes = detail, f"padding of the padded loop {padding:.3f}"
    print(f"{task}: {count} rows, {tokens} tokens, padding {padding:.1%}; gate {verdict} {detail}", flush=True)
    if verdict == "pass":
        times = interleaved(variants, loop.device, repeats, lambda line: print(line, flush=True))
        for name, record in records.items():
            record.timed(times[name])
            record.peak_incremental_mib = peak(variants[name], loop.device)
        ratio = percentile([p / o for o, p in zip(times["ours"], times["padded"])], 0.5)
        rates = {name: count / (record.time_ms or 1) * 1e3 for name, record in records.items()}
        print(f"{task}: ours {rates['ours']:.1f} rows/s, padded {rates['padded']:.1f} rows/s, ratio {ratio:.2f}")
    return list(records.values())


def main(argv: list[str] | None = None) -> int:
    """Run, print, write; 1 when the gate fails."""
    parser = parser_of("benchmarks.studies.evaluate", __doc__, on_device=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--width", type=int, default=256, help="of encoder and LLM, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of encoder and of LLM")
    parser.add_argument("--limit", type=int, help="only the first rows of each language")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    records = run_all(options.data, options.device, options.width, options.layers, options.limit, options.repeats)
    if options.json:
        write(options.json, records)
    return int(any(record.gate == "fail" for record in records))


if __name__ == "__main__":
    sys.exit(main())
