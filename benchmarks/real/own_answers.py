"""SDRRL's claim on a small LLM: what its own answers, gold ones, gold ones with noise and shuffled ones teach a stack.

    python -m benchmarks.real.own_answers --encoder models/e5-small --llm models/smollm2-135m --task nusax --data DIR \
        --output runs/own-answers --seeds 0 1

An LLM that was taught the task in English writes its own answers to English prompts (the training texts). A stack over
it, in English alone, learns to write after the same texts: those answers, by cross-entropy or with the KL to the LLM
besides; the gold answers; gold answers of which a fifth are wrong; and its own answers, shuffled among the texts. All
are then read by the likelihood of the labels in every language, beside the LLM itself. The learning rates are those of
the comparison of recipes. Source of the claim: arXiv 2402.12204. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from mtllm_fast.evaluation import get_task
from mtllm_fast.evaluation.tasks import Task

AFTER = "\nLabel:"
NOISE = 0.2
# name: (file of answers, weight of the KL to the LLM)
ARMS = {
    "own answers": ("own", 0.0),
    "own answers + KL": ("own", 1.0),
    "gold": ("gold", 0.0),
    "gold, 20 % wrong": ("noisy", 0.0),
    "own answers, shuffled": ("shuffled", 0.0),
    "own answers, shuffled + KL": ("shuffled", 1.0),
}
TRAINING = [
    *("--bf16", "--tokens", "1024", "--max-length", "256", "--max-target-tokens", "16", "--max-rows", "16"),
    *("--warmup", "0.1", "--lora.dropout", "0.0", "--max-steps", "-1", "--epochs", "4"),
    *("--report-to", "none", "--no-progress", "--resume"),
]


def run(*words: object) -> None:
    """One `mtllm` command; what it says goes where this process writes."""
    subprocess.run([sys.executable, "-m", "mtllm_fast.cli", *map(str, words)], check=True)


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_gold(folder: Path, task: Task, data: str) -> None:
    """prompts.jsonl, gold.jsonl, and noisy.jsonl, where a fifth of the labels is another one."""
    rows, names, chance = task.rows(data, task.english, "train"), list(task.labels), random.Random(0)
    labels = [row.label for row in rows if row.label is not None]
    wrong = [
        chance.choice([k for k in range(len(names)) if k != label]) if chance.random() < NOISE else label
        for label in labels
    ]
    write(folder / "prompts.jsonl", [{"id": row.id, "text": row.text} for row in rows])
    for name, found in (("gold", labels), ("noisy", wrong)):
        pairs = zip(rows, found, strict=True)
        write(folder / f"{name}.jsonl", [{"text": row.text, "target": names[label]} for row, label in pairs])


def write_shuffled(folder: Path) -> float:
    """shuffled.jsonl, and the share of the LLM's own answers that are right."""
    own, gold = read(folder / "own.jsonl"), read(folder / "gold.jsonl")
    answers = [row["target"] for row in own]
    right = sum(row["target"].strip() == known["target"] for row, known in zip(own, gold, strict=True))
    random.Random(1).shuffle(answers)
    write(folder / "shuffled.jsonl", [{"text": r["text"], "target": a} for r, a in zip(own, answers, strict=True)])
    return right / len(own)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("--encoder", "--llm", "--task", "--data", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="by default all")
    parser.add_argument("--limit", type=int, default=100, help="test rows a language")
    parser.add_argument("--after", default=AFTER, help="the prompt behind a text")
    parser.add_argument("--lr", default="5e-4", help="of the stacks")
    options = parser.parse_args(argv)
    folder, task = Path(options.output), get_task(options.task, options.data)
    folder.mkdir(parents=True, exist_ok=True)
    after = ("--after", options.after)
    teacher, merged = folder / "llm", folder / "merged"
    given = ("--llm", options.llm, "--reader", "llm", "--task", options.task, "--data", options.data)
    run("sft", *given, *after, *TRAINING, "--seed", 0, "--lr", "4e-4", "--output", teacher)
    if not merged.exists():
        run("convert", "--model", teacher, "--to", "merged", "--output", merged)
    write_gold(folder, task, options.data)
    if not (folder / "own.jsonl").exists():
        answers = ("--text", folder / "prompts.jsonl", "--max-new-tokens", 8, "--output", folder / "own.jsonl")
        run("respond", "--model", teacher, *after, *answers, "--no-progress")
    print(f"own answers that are right: {write_shuffled(folder):.1%}", flush=True)
    for seed in options.seeds:
        for arm in options.arms:
            answers, kl = ARMS[arm]
            print(f"{arm}, seed {seed}", flush=True)
            stack = ("--encoder", options.encoder, "--llm", merged / "llm", "--projection.boundary", "--loss.kl", kl)
            text = ("--text", folder / f"{answers}.jsonl", *after, "--lr", options.lr, "--seed", seed)
            run("sft", *stack, *text, *TRAINING, "--output", folder / arm / f"seed-{seed}")
    suite = {
        "output": str(folder / "suite"),
        "seeds": options.seeds,
        "dtype": "bfloat16",
        "models": {
            "LLM itself": [str(teacher)] * len(options.seeds),
            **{arm: str(folder / arm / "seed-{seed}") for arm in options.arms},
        },
        "tasks": [{"task": options.task, "data": options.data, "limit": options.limit}],
        "against": options.arms[0],
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    run("evaluate", "--suite", folder / "suite.yaml", "--no-progress")


if __name__ == "__main__":
    main()
