"""Any Hugging Face decoder on a packed batch: every text without padding, each as if it were alone.

    python examples/packed_llm.py --llm models/smollm2-135m

Shows that the packed states are those of one text at a time, and how many padded tokens were saved.
"""

import argparse

import torch
from transformers import AutoTokenizer

from mtllm_fast import PackedBatch
from mtllm_fast.models import PackedLLM

TEXTS = (
    "A river runs past the old mill.",
    "Rain.",
    "The committee has postponed its decision on the new bridge, because nobody could say what it would cost.",
)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llm", required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.llm)
    llm = PackedLLM.from_pretrained(options.llm, causal=True).eval()
    ids = [torch.tensor(tokenizer(text).input_ids) for text in TEXTS]
    packed = PackedBatch.from_sequences(ids)
    states = llm(packed)  # (T, D)
    alone = torch.cat([llm(PackedBatch.from_sequences([one])) for one in ids])
    largest = float((states - alone).abs().max() / alone.abs().max())
    padded = len(ids) * max(map(len, ids))
    print(f"{packed.num_tokens} tokens instead of {padded} padded ones; largest difference {largest:.1e}")


if __name__ == "__main__":
    main()
