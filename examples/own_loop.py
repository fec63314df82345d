"""Stage 1 as a loop of your own, with gradient accumulation that is exact.

    python examples/own_loop.py --encoder models/e5-small --llm models/smollm2-135m --text english.txt --output runs/own

The teacher is the LLM on its own tokens, the student the same LLM on the encoder's states of the same text. Losses are
(sum, count) pairs: the counts of all batches of a step are added first, and each sum is divided by them once.
"""

import argparse

import torch

from mtllm_fast import MTLLM, DistillationLoss, DistillationWeights, LoraSettings, read_rows
from mtllm_fast.data.collate import collate

BATCH, ACCUMULATED = 16, 2


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("encoder", "llm", "text", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MTLLM.stack(options.encoder, options.llm, causal=True, lora=LoraSettings(r=16))
    loss = DistillationLoss(DistillationWeights(pooled_mse=1.0, paired_mse=1.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    texts = list(read_rows(options.text))
    for step in range(options.steps):
        at = step * BATCH * ACCUMULATED
        rows = [texts[(at + i) % len(texts)] for i in range(BATCH * ACCUMULATED)]
        batches = [collate(rows[i : i + BATCH], model.tokenizer) for i in range(0, len(rows), BATCH)]
        counts = [loss.weights.counts(batch) for batch in batches]
        total = {name: sum(count[name] for count in counts) for name in counts[0]}
        value = 0.0
        for batch in batches:
            teacher = model.teacher_states(batch.llm)
            part = loss.total(loss(model.states(batch.mt), teacher, batch), total)
            part.backward()
            value += part.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: {value:.4f}")
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
