"""The fused losses in distillation of your own: KL over an LM head and MSE of pooled states, without logits or padding.

    python examples/fused_losses.py

Two packed batches of one student and one teacher, whose tokenizers cut the texts differently: sequences end where
`cu_*` say, and `rows_*` name the pairs of tokens that are compared.
"""

import argparse

import torch
from mtllm_fast.kernels import linear_kl, pooled_mse


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    width, vocabulary = 64, 5000
    head = torch.randn(vocabulary, width) / width**0.5  # (V, D), frozen
    teacher = torch.randn(9, width)  # (T_t, D): texts of 4 and 5 tokens
    student = torch.zeros(7, width, requires_grad=True)  # (T_s, D): the same texts, of 3 and 4 tokens
    cu_teacher, cu_student = torch.tensor([0, 4, 9]), torch.tensor([0, 3, 7])
    rows_teacher, rows_student = torch.tensor([1, 3, 5, 8]), torch.tensor([0, 2, 4, 6])
    optimizer = torch.optim.Adam([student], lr=0.1)
    for step in range(options.steps):
        kl, pairs = linear_kl(student, head, teacher, rows_s=rows_student, rows_t=rows_teacher, temperature=2.0)
        mse, texts = pooled_mse(student, teacher, cu_student, cu_teacher)
        loss = kl / pairs + mse / texts
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: {float(loss):.4f}")


if __name__ == "__main__":
    main()
