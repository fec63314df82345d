"""The packed attention contract: what a call asks for, what every backend answers, and the plan that they share.

    out[i] = softmax(cap(scale * q[i] @ k[S(i)].T) + bias) @ v[S(i)]      cap(x) = softcap * tanh(x / softcap), or x

The bias, where there is one, is a number per head and distance j - i.

S(i) are the rows of i's own sequence that i sees, by their distance i - j:

    window     causal              bidirectional
    None       0 <= i - j          all
    w          0 <= i - j < w      |i - j| <= w

Hugging Face's convention: looking back the window counts the row itself, looking both ways it does not. Models whose
windows count it both ways (Gemma 3) say so in the plan (`exclusive`), and their w is one less here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...data.pack import PackedBatch

Made = TypeVar("Made")


@dataclass(frozen=True)
class Call:
    """What one attention call asks of a backend."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    needs_grad: bool = False
    bias: bool = False

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How many rows a row sees to its left and right, itself not counted; None is all of them."""
        if self.causal:
            return (None if self.window is None else self.window - 1), 0
        return self.window, self.window

    def __str__(self) -> str:
        parts = [self.device.type, str(self.dtype).removeprefix("torch."), f"head size {self.head_dim}"]
        parts.append("causal" if self.causal else "bidirectional")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.softcap is not None:
            parts.append(f"soft-cap {self.softcap:g}")
        if self.bias:
            parts.append("bias by distance")
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}")
        parts.append("with gradients" if self.needs_grad else "no gradients")
        return ", ".join(parts)


@dataclass(frozen=True)
class DistanceBias:
    """What is added to the scores, by the distance j - i from a row to the one that it sees.

    Args:
        values: (H, 2 n - 1), of the distances 1 - n to n - 1; n is at least the length of the longest sequence.
    """

    values: Tensor

    def square(self, length: int) -> Tensor:
        """(H, length, length), of rows i and the rows j that they see."""
        steps = torch.arange(length, device=self.values.device)
        return self.values[:, steps - steps[:, None] + self.values.shape[1] // 2]


@dataclass(frozen=True, eq=False)
class Branches:
    """Causal sequences of which several begin alike: the rows of a common beginning are there once.

    Everything but attention runs on these T rows. Attention runs on the E rows of the whole sequences, whose queries,
    keys and values are copies of them.

    Fields:
        batch: the T rows, ids and positions within their sequences; its lengths are of whole groups.
        whole: the sequences.
        rows: (E,) int64, the row of `batch` that each row of `whole` is.
        slots: (T,) int64, for each row of `batch` one of `whole` that it is.
    """

    batch: PackedBatch
    whole: PackedBatch
    rows: Tensor
    slots: Tensor


@dataclass
class AttentionPlan:
    """What every layer needs to know about a packed batch, computed once per model call.

    Args:
        batch: the packed batch.
        causal: rows see only themselves and earlier rows of their sequence.
        backend: a name of `BACKENDS` or "flash_attn", or None to choose by the call.
        exclusive: the model's windows that look both ways mean |i - j| < w (Gemma 3) and not |i - j| <= w.
        branches: whose `whole` the batch is; the model then reads its `batch`.
        elsewhere: plans of other sequences of the same rows, by the attention modules that have one of their own.
    """

    batch: PackedBatch
    causal: bool
    backend: str | None = None
    exclusive: bool = False
    branches: Branches | None = None
    elsewhere: Mapping[nn.Module, AttentionPlan] = field(default_factory=dict, repr=False)
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def at(self, module: nn.Module) -> AttentionPlan:
        """The plan of an attention module."""
        return self.elsewhere.get(module, self)

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make()` gave the first time for `key`: the layers of a model call share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the sequences that have rows: not every kernel takes an empty one."""
        return tuple(length for length in self.batch.lengths if length)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(len(lengths) + 1,) int32 on the batch's device."""
        if len(self.lengths) == self.batch.num_sequences:
            return self.batch.cu_seqlens
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.batch.device)


class Backend(ABC):
    """One way to compute packed attention. It says what it cannot serve; it never computes something else."""

    name: str
    about: str  # one line for `mtllm doctor`
    automatic = True  # False: only where it is named

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """Why the backend does not run on `device` at all, None where it does."""

    @abstractmethod
    def cannot(self, call: Call) -> str | None:
        """Why it cannot serve `call` on a device where it runs, None where it can."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,  # (T, H, d)
        k: Tensor,  # (T, H_kv, d)
        v: Tensor,  # (T, H_kv, d_v)
        plan: AttentionPlan,
        call: Call,
        bias: DistanceBias | None = None,
    ) -> Tensor:  # (T, H, d_v)
        """The attention of a call that `refusal` passed; T >= 1."""

    def refusal(self, call: Call) -> str | None:
        """Why this backend does not serve `call`, None where it does."""
        return self.missing(call.device) or self.cannot(call)


def cuda_missing(
    device: torch.device, least: tuple[int, int], most: tuple[int, int] | None = None, *, amd: bool = False
) -> str | None:
    """Why `device` is no GPU of compute capability `least` up to (not including) `most`, None where it is."""
    if device.type != "cuda":
        return "runs on CUDA only"
    if torch.version.hip is not None:
        return None if amd else "runs on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < least:
        return f"needs compute capability {least[0]}.{least[1]}, this GPU has {capability[0]}.{capability[1]}"
    if most is not None and capability >= most:
        return f"has no kernels for compute capability {capability[0]}.{capability[1]}"
    return None


def load(module: str, name: str, pip: str) -> tuple[Callable[..., Any] | None, str | None]:
    """The function `name` of `module`, or None and why it is not to be had; `pip` says how the package is installed."""
    try:
        return getattr(import_module(module), name), None
    except ModuleNotFoundError as error:
        if module.startswith(error.name or "?"):
            return None, f"is not installed ({pip})"
        return None, f"cannot be imported: {error}"
    except (ImportError, AttributeError, OSError) as error:
        return None, f"cannot be imported: {str(error).splitlines()[0]}"


def half_cannot(call: Call, largest_head: int) -> str | None:
    """The limits that FlashAttention kernels share."""
    if call.bias:
        return "takes no bias of the scores"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if call.head_dim > largest_head:
        return f"takes heads up to {largest_head}, not {call.head_dim}"
    if call.value_dim != call.head_dim:
        return f"needs values as wide as keys, not {call.value_dim} and {call.head_dim}"
    return None


def reference(
    q: Tensor,  # (T, H, d)
    k: Tensor,  # (T, H_kv, d)
    v: Tensor,  # (T, H_kv, d_v)
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: DistanceBias | None = None,
) -> Tensor:  # (T, H, d_v)
    """The contract in plain torch, one sequence after another, in the dtype of its inputs."""
    groups = q.shape[1] // k.shape[1]
    parts = []
    for q_s, k_s, v_s in zip(*(x.split(list(lengths)) for x in (q, k, v))):
        k_s, v_s = k_s.repeat_interleave(groups, 1), v_s.repeat_interleave(groups, 1)
        scores = torch.einsum("ihd,jhd->hij", q_s, k_s) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        steps = torch.arange(len(q_s), device=q.device)
        if bias is not None:
            scores = scores + bias.square(len(q_s)).to(scores.dtype)
        scores = scores.masked_fill(~visible(steps[:, None] - steps, causal, window), -torch.inf)
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v_s))
    return torch.cat(parts)


def visible(distance: Tensor, causal: bool, window: int | Tensor | None) -> Tensor:
    """Which rows see which, by `distance` = i - j within a sequence; bool, of its shape."""
    if causal:
        seen = distance >= 0
        return seen if window is None else seen & (distance < window)
    return distance.abs() <= window if window is not None else torch.ones_like(distance, dtype=torch.bool)
