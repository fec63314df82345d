"""A classifier for every language of the encoder from English labels alone: the three stages from Python.

    python examples/three_stages.py --encoder models/e5-small --llm models/smollm2-135m --text english.txt \
        --train train.tsv --valid valid.tsv --output runs/stages --ask "Mto unapita kando ya kinu"

train.tsv and valid.tsv have the columns text and label.
"""

import argparse
import csv
from dataclasses import replace
from pathlib import Path

from mtllm_fast import DistillationWeights, Engine, adapt, distill, finetune, read_rows
from mtllm_fast.training import AdaptConfig, DistillConfig, FinetuneConfig, OptimSettings


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("encoder", "llm", "text", "train", "valid", "output", "ask"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--language", help="code of `ask`, where the encoder has language codes")
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    options = parser.parse_args()
    with Path(options.train).open(encoding="utf-8", newline="") as file:
        labels = sorted({row["label"] for row in csv.DictReader(file, delimiter="\t")})
    train, valid = (
        list(read_rows(path, label_column="label", labels=labels)) for path in (options.train, options.valid)
    )
    settings = OptimSettings(max_steps=options.steps, max_rows=16, warmup=0.1, report_to="none", seed=0)
    root = Path(options.output)
    teacher, adapted, stack = (str(root / name) for name in ("teacher", "adapted", "stack"))
    llm, encoder = options.llm, options.encoder
    weights = DistillationWeights(pooled_mse=1.0, paired_mse=1.0)
    texts = read_rows(options.text)
    adapt(AdaptConfig(encoder, llm, adapted, causal=True, loss=weights, over_variance=True, train=settings), texts)
    finetune(FinetuneConfig(llm=llm, output=teacher, causal=True, train=settings), train, labels, valid)
    weights = DistillationWeights(pooled_mse=1.0, head_kl=1.0)
    unlabelled = [replace(row, label=None) for row in train]
    distill(
        DistillConfig(adapted, teacher, stack, loss=weights, init_from="teacher", train=settings), unlabelled, valid
    )
    answer = Engine(stack).classify([options.ask], options.language)
    print(answer.labels[0], {label: round(float(p), 3) for label, p in zip(labels, answer.probabilities[0])})


if __name__ == "__main__":
    main()
