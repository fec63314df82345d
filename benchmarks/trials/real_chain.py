"""The whole chain on real files with small models made here: adapt, finetune, distill, evaluate, report.

    python -m benchmarks.trials.real_chain --output runs/real-chain [--data ../shared/data]

Every step is an `mtllm` command, printed before it runs. The MT encoder and the LLM start from random weights and train
for minutes on one core, so the scores say nothing of the method; the files, the 205 languages of SIB-200, the 12 of
NusaX and the report are real. There is no MT model either: translate-test reads stand-in translations, the English text
with words left out, more of them the poorer the language's resources. Finished steps are kept; run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from .. import DATA

SOURCES = {"sib200": "sib200", "nusax": "nusax_senti"}
SEEDS = ("1", "2")
DROPPED = {
    "class 5": 0.1,
    "class 4": 0.2,
    "class 3": 0.3,
    "class 2": 0.4,
    "class 1": 0.5,
    "class 0": 0.6,
    "unknown": 0.6,
}


def build_base(folder: Path, data: Path) -> None:
    """A random MT encoder with NLLB's codes and a random LLM; tokenizers trained on a little of every language."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, M2M100ForConditionalGeneration

    from mtllm_fast.evaluation.tasks import TASKS
    from tests.tiny import llm_tokenizer, m2m100_config, nllb_tokenizer

    english, lines = [], []
    for name, source in SOURCES.items():
        task = TASKS[name]
        for language in task.languages(data / source):
            rows = [row.text for row in task.rows(data / source, language, "train", labelled=False)]
            lines += rows if language == task.english else rows[:12]
            english += rows if language == task.english else []
    torch.manual_seed(0)
    mt = nllb_tokenizer(lines, 6000)
    model = M2M100ForConditionalGeneration(
        m2m100_config(
            len(mt), d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=64, encoder_layers=1, max_position_embeddings=512
        )
    )
    llm_words = llm_tokenizer(english, 4000)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(llm_words), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            bos_token_id=llm_words.bos_token_id, eos_token_id=llm_words.eos_token_id,
            pad_token_id=llm_words.pad_token_id,
        )
    )  # fmt: skip
    for name, one, tokenizer in (("llm", llm, llm_words), ("encoder", model, mt)):
        one.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "english.txt").write_text("\n".join(" ".join(text.split()) for text in english) + "\n", encoding="utf-8")


def write_stand_in_translations(path: Path, task_name: str, source: Path) -> None:
    """The English test rows with words left out, as `mtllm translate` would write translations."""
    from mtllm_fast.evaluation.languages import describe
    from mtllm_fast.evaluation.tasks import TASKS

    task = TASKS[task_name]
    english = task.rows(source, task.english, "test")
    path.mkdir(parents=True, exist_ok=True)
    for language in task.languages(source):
        code = task.mt_code(language)
        if code is None or language == task.english:
            continue
        rng = random.Random(language)
        share = DROPPED[describe(language, code).resource]
        with (path / f"{language}_test.jsonl").open("w", encoding="utf-8") as file:
            for row in english:
                words = [word for word in row.text.split() if rng.random() >= share] or row.text.split()[:1]
                record = {"id": row.id, "language": language, "field": "text", "translation": " ".join(words)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def suite(root: Path, data: Path) -> str:
    tasks = "\n".join(f"  - {{task: {name}, data: {data / source}}}" for name, source in SOURCES.items())
    return f"""output: {root / "report"}
seeds: [{", ".join(SEEDS)}]
models:
  MT-LLM: {root}/{{task}}/mt-llm/seed-{{seed}}
  MT encoder: {root}/{{task}}/encoder
tasks:
{tasks}
translate_test:
  teacher: {root}/{{task}}/teacher/seed-{{seed}}
  translations: {root}/{{task}}/translations
alignment: true
"""


def mtllm(done: Path, *arguments: str) -> None:
    """Run `mtllm ...` unless its result is there."""
    if done.exists():
        return
    print("$ mtllm", " ".join(arguments), flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mtllm_fast.cli", *arguments], check=True)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(prog="benchmarks.trials.real_chain", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args(argv)
    root, data = options.output.resolve(), options.data.resolve()
    base = root / "base"
    if not (base / "english.txt").is_file():
        build_base(base, data)
    common = (
        "--no-progress",
        "--report-to",
        "none",
        "--save-steps",
        "1000",
        "--log-steps",
        "50",
        "--max-length",
        "128",
    )
    mtllm(
        root / "adapted" / "config.json", "adapt", "--encoder", str(base / "encoder"), "--llm", str(base / "llm"),
        "--text", str(base / "english.txt"), "--output", str(root / "adapted"), "--max-steps", "150", "--lr", "1e-3",
        *common,
    )  # fmt: skip
    for name, source in SOURCES.items():
        task = ("--task", name, "--data", str(data / source), "--epochs", "6", "--lr", "2e-3", *common)
        folder = root / name
        mtllm(
            folder / "teacher" / f"seed-{SEEDS[-1]}" / "config.json", "finetune", "--llm", str(base / "llm"),
            "--output", str(folder / "teacher"), "--seeds", *SEEDS, *task,
        )  # fmt: skip
        mtllm(
            folder / "encoder" / "config.json", "finetune", "--encoder", str(base / "encoder"),
            "--output", str(folder / "encoder"), *task,
        )  # fmt: skip
        mtllm(
            folder / "mt-llm" / f"seed-{SEEDS[-1]}" / "config.json", "distill", "--model", str(root / "adapted"),
            "--teacher", str(folder / "teacher" / "seed-{seed}"), "--output", str(folder / "mt-llm"),
            "--train-projection", "--seeds", *SEEDS, *task,
        )  # fmt: skip
        if not (folder / "translations").is_dir():
            write_stand_in_translations(folder / "translations", name, data / source)
    (root / "suite.yaml").write_text(suite(root, data), encoding="utf-8")
    mtllm(root / "report" / "scores.html", "evaluate", "--suite", str(root / "suite.yaml"), "--no-progress")
    return 0


if __name__ == "__main__":
    sys.exit(main())
