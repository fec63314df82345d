"""Which process takes which packs of a step, so that none waits long for the others."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# Tokens of one text at which attention costs as much as the linear layers: 6 times the width of the LLM (Llama-3-8B:
# 24576, 1B models: 12288).
_EVEN = 16384
# The student runs forward and backward, the teacher forward.
_PASSES = (2.0, 1.0)


def pack_cost(costs: Sequence[tuple[int, ...]], pack: Sequence[int]) -> float:
    """What a pack costs in time, in tokens of one forward pass: tokens and, for attention, their squares by text.

    Args:
        costs: tokens per row, one number per side, the MT side first. pack: the rows in the pack.
    """
    return sum(
        passes * sum(costs[row][side] * (1 + costs[row][side] / _EVEN) for row in pack)
        for side, passes in zip(range(len(costs[0])), _PASSES)
    )


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deal packs to `ranks` processes, equally many to each, with sums of costs as even as can be had quickly.

    The costliest pack goes first, always to the process with the least so far (longest processing time first; Graham,
    1969). With one pack each there is nothing to balance, and they are dealt in order.

    Args:
        costs: of the packs of one step; their number is a multiple of `ranks`.

    Returns:
        Per process the numbers of its packs, ascending.
    """
    each, over = divmod(len(costs), ranks)
    assert each and not over, f"{len(costs)} packs for {ranks} processes"
    if each == 1:
        return [[number] for number in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(number)
        if len(shares[rank]) < each:
            heapq.heappush(loads, (load + costs[number], rank))
    return [sorted(share) for share in shares]
