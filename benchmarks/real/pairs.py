"""Texts in many languages with their English, of a task whose rows with one id are translations of each other.

    python -m benchmarks.real.pairs --task nusax --data DIR --limit 500 --output pairs.jsonl

Columns: text, language, target (the English). For recipes that learn from translations
(`mtllm train --list`): the training split is read, and nobody's labels.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from mtllm_fast.evaluation import get_task


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True, help="folder of the task")
    parser.add_argument("--languages", nargs="+", help="by default all")
    parser.add_argument("--limit", type=int, help="rows in all, drawn once with a fixed seed")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    task = get_task(options.task)
    english = {row.id: row.text for row in task.rows(options.data, task.english, "train")}
    pairs = [
        {"text": row.text, "language": task.mt_code(language) or language, "target": english[row.id]}
        for language in options.languages or task.languages(options.data)
        if language != task.english
        for row in task.rows(options.data, language, "train")
        if row.id in english
    ]
    if not pairs:
        parser.error(f"--data {options.data}: no training row shares its id with an English one")
    random.Random(0).shuffle(pairs)
    pairs = pairs[: options.limit]
    options.output.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    print(f"{options.output}: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
