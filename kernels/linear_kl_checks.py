"""Validation of `linear_kl`'s arguments: errors that name the argument, its value and what would be right."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from .linear_kl_cpu import FORWARD, JSD, REVERSE
from .moments import TeacherMoments

DIVERGENCES = (FORWARD, REVERSE, JSD)
FORMS = ("auto", "difference", "moments")
T = TypeVar("T", Tensor, Tensor | None)


def check_matrix(name: str, x: Tensor, device: torch.device | None = None) -> None:
    """`x` is a floating point matrix, on `device` if one is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_local(name, x)
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the states are on {device}; move it there")


def check_head(name: str, w: Tensor, device: torch.device) -> None:
    check_matrix(name, w, device)
    if 0 in w.shape:
        raise ValueError(f"{name} must have at least one vocabulary row and a width of 1, got shape {tuple(w.shape)}")


def check_side(name: str, h: Tensor, w_name: str, w: Tensor, device: torch.device) -> None:
    check_matrix(name, h, device)
    check_head(w_name, w, device)
    if h.shape[1] != w.shape[1]:
        raise ValueError(f"{name} is {h.shape[1]} wide but {w_name} is {w.shape[1]} wide; a head is (V, width)")
    if h.dtype != w.dtype:
        advice = "cast one of them" if torch.is_autocast_enabled(device.type) else "cast one of them or use autocast"
        raise ValueError(f"{name} is {h.dtype} but {w_name} is {w.dtype}; {advice}")


def check_vector(name: str, x: Tensor | None, length: int, what: str, device: torch.device, kind: str) -> None:
    if x is None:
        return
    if x.dim() != 1 or x.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},) ({what}), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the states are on {device}; move it there")
    if kind == "rows" and x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must hold int64 or int32 row numbers, got {x.dtype}")
    if kind != "rows" and not (x.dtype.is_floating_point or (kind == "weight" and x.dtype == torch.bool)):
        raise TypeError(f"{name} must be floating point{' or bool' if kind == 'weight' else ''}, got {x.dtype}")


def check_options(temperature: float, softcap: float | None, divergence: str, beta: float, form: str) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, but must be a finite number above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}, but must be above 0, or None for no soft-capping")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, but must be one of {', '.join(DIVERGENCES)}")
    if divergence == JSD and not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, but must be between 0 and 1")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, but must be one of {', '.join(FORMS)}")


def plain_divergence(divergence: str, beta: float) -> str:
    """The JSD of β 0 or 1 is the forward or the reverse KL, by the convention of `linear_kl`."""
    if divergence == JSD and beta in (0, 1):
        return FORWARD if beta == 0 else REVERSE
    return divergence


def gathered(name: str, w: T, constant: bool = False) -> T:
    """A sharded (DTensor) weight gathered; anything else, None too, unchanged.

    One that is trained (is no `constant` to the op) is refused: `full_tensor()` gives every process the gradient of its
    own rows alone, and whether those of all must be added depends on whether the rows differ, which only the caller
    knows.
    """
    full = getattr(w, "full_tensor", None)
    if w is None or full is None:
        return w
    if constant:
        return w.detach().full_tensor()  # type: ignore[attr-defined]
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} is a sharded parameter (DTensor) that requires a gradient: use it inside the forward of its "
            f"fully_shard module, detach it, or pass {name}.full_tensor(grad_placements=[Partial()]) where every "
            "process has rows of its own ([Replicate()] where all have the same)"
        )
    return full()


def check_local(name: str, x: Tensor) -> None:
    """States are those of one process."""
    if hasattr(x, "full_tensor"):
        raise ValueError(f"{name} is a DTensor, but the ops take the rows of one process: pass {name}.to_local()")


def autocast(x: T) -> T:
    """What autocast does to an operand of F.linear; what is no tensor is returned as it is."""
    if not isinstance(x, Tensor) or x.is_meta:
        return x
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype.is_floating_point and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if cast else x


def common_vocabulary(v_s: int, v_t: int, vocab_size: int | None, other: str) -> int:
    if vocab_size is None:
        if v_s != v_t:
            raise ValueError(
                f"w_s has {v_s} vocabulary rows but {other} has {v_t}; if the longer one is padded, pass "
                f"vocab_size={min(v_s, v_t)} (padding then counts as -inf), otherwise the vocabularies differ"
            )
        return v_s
    if not 1 <= vocab_size <= min(v_s, v_t):
        raise ValueError(f"vocab_size is {vocab_size}, but must be between 1 and {min(v_s, v_t)}, the smaller head")
    return vocab_size


def check_moments(
    teacher: TeacherMoments,
    w_s: Tensor,
    vocab: int,
    tau: float,
    pairs: int,
    rows_t: Tensor | None,
    device: torch.device,
) -> None:
    if teacher.device != device:
        raise ValueError(
            f"teacher is on {teacher.device}, but the states are on {device}; move it with teacher.to(device)"
        )
    if teacher.temperature != tau:
        raise ValueError(f"temperature is {tau}, but teacher was computed with {teacher.temperature}")
    if teacher.vocab_size != vocab:
        raise ValueError(f"vocab_size is {vocab}, but teacher was computed over {teacher.vocab_size} entries")
    if teacher.m.shape[1] != w_s.shape[1]:
        raise ValueError(f"teacher.m is {teacher.m.shape[1]} wide, but w_s is {w_s.shape[1]} wide")
    if rows_t is None and len(teacher) != pairs:
        raise ValueError(f"teacher has {len(teacher)} rows for {pairs} pairs; pass rows_t to say which belong together")
