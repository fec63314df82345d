"""Segments of packed rows, and the partition of all rows that the streaming kernels walk.

`bounds` says which rows are pooled: `cu_seqlens (B + 1,)` with a pooling ("mean", "first", "last"), or `spans (S, 2)`
of start and end rows, which may come in any order but must not overlap. An empty segment is legal.

A `Partition` cuts [0, T) into intervals, each owned by one segment or by none, so that a kernel can visit every row
once. Interval g is rows edges[g] to edges[g + 1]. Its pieces of C rows, counted from its start, get the slots
`g + edges[g] // C + k`: the slots of different intervals never meet, there are at most G + T // C, and which rows share
a slot depends on the segment alone. So sums over slots have no order to race for, and do not change with the packing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .device_checks import require

POOLINGS = ("mean", "first", "last")
SPANS = "spans"


def check_bounds(name: str, bounds: Tensor, device: torch.device, what: str) -> None:
    """Shape, dtype and device of `cu_seqlens (B + 1,)` or `spans (..., 2)`; the values are checked inside the ops."""
    if not isinstance(bounds, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(bounds).__name__}")
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {bounds.dtype}")
    if bounds.device != device:
        raise ValueError(f"{name} is on {bounds.device}, but {what} is on {device}; move it there")
    if name.startswith("spans"):
        if bounds.dim() < 2 or bounds.shape[-1] != 2:
            raise ValueError(
                f"{name} must have shape (S, 2) or (B, C, 2), start and end rows, got {tuple(bounds.shape)}"
            )
    elif bounds.dim() != 1 or bounds.shape[0] < 2:
        raise ValueError(f"{name} must have shape (B + 1,) with B >= 1, got {tuple(bounds.shape)}")


def segment_ranges(bounds: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """(starts, ends), each (S,), of the pooled rows."""
    if pooling == SPANS:
        return bounds[:, 0], bounds[:, 1]
    starts, ends = bounds[:-1], bounds[1:]
    if pooling == "first":
        return starts, torch.minimum(starts + 1, ends)
    if pooling == "last":
        return torch.maximum(ends - 1, starts), ends
    return starts, ends


def check_values(bounds: Tensor, pooling: str, rows: int) -> None:
    """CPU: raise ValueError unless the segments are disjoint ranges within [0, rows)."""
    if pooling != SPANS:
        values = bounds.tolist()
        if values[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {values[0]}")
        if any(b < a for a, b in pairwise(values)):
            raise ValueError(f"cu_seqlens must not descend, got {values if len(values) < 20 else 'a descending pair'}")
        if values[-1] > rows:
            raise ValueError(f"cu_seqlens ends at {values[-1]}, but there are {rows} rows")
        return
    previous, end_of_previous = -1, 0
    for start, end, index in sorted((s, e, i) for i, (s, e) in enumerate(bounds.tolist())):
        if not 0 <= start <= end <= rows:
            raise ValueError(f"spans[{index}] is rows {start} to {end}, but must be ascending and within 0 to {rows}")
        if start == end:
            continue
        if start < end_of_previous:
            raise ValueError(f"spans[{previous}] and spans[{index}] overlap at row {start}; spans must not overlap")
        previous, end_of_previous = index, end


def assert_values(bounds: Tensor, pooling: str, rows: int) -> None:
    """CUDA: the same as a device-side assertion; a ValueError in debug."""
    flat = bounds.flatten()
    if pooling != SPANS:
        good = (flat[0] == 0) & (flat[1:] >= flat[:-1]).all() & (flat[-1] <= rows)
        require(good, f"cu_seqlens must start at 0, not descend, and end within the {rows} rows")
        return
    inside = ((bounds[:, 0] >= 0) & (bounds[:, 1] >= bounds[:, 0]) & (bounds[:, 1] <= rows)).all()
    require(inside, f"spans must be ascending and within the {rows} rows")


@dataclass(frozen=True)
class Partition:
    """Intervals that cover [0, rows).

    Attributes:
        edges: (G,) first row of each interval; the last interval ends at `rows`.
        order: None where interval g < S is segment g and the last interval is nobody's. Otherwise (S,): intervals of
            even number are nobody's, interval 2 i + 1 is segment order[i].
        position: None, or (S,), the interval of each segment.
        segments: S.
        rows: T.
    """

    edges: Tensor
    order: Tensor | None
    position: Tensor | None
    segments: int
    rows: int

    @property
    def intervals(self) -> int:
        return self.edges.shape[0]

    def slots(self, piece: int) -> int:
        """Upper limit of the slots of pieces of `piece` rows."""
        return self.intervals + self.rows // piece


def partition(bounds: Tensor | None, pooling: str, rows: int, device: torch.device) -> Partition:
    """The partition of `rows` rows by the segments of `bounds`; without bounds one interval that nobody owns."""
    if bounds is None:
        return Partition(torch.zeros(1, dtype=torch.int64, device=device), None, None, 0, rows)
    if pooling == "mean":
        return Partition(bounds, None, None, bounds.shape[0] - 1, rows)
    starts, ends = (x.long() for x in segment_ranges(bounds, pooling))
    count = starts.shape[0]
    # Empty segments go to the front, where they lie inside no other.
    empty = starts >= ends
    order = torch.argsort(starts.masked_fill(empty, -1), stable=True)
    starts, ends = starts.masked_fill(empty, 0)[order], ends.masked_fill(empty, 0)[order]
    if pooling == SPANS and count > 1:
        require((starts[1:] >= ends[:-1]).all(), "spans must not overlap")
    edges = torch.stack((starts, ends), 1).flatten()
    position = torch.empty_like(order)
    position[order] = torch.arange(count, device=device) * 2 + 1
    return Partition(torch.nn.functional.pad(edges, (1, 0)), order, position, count, rows)
