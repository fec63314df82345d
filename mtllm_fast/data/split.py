"""A batch in two parts, for one that does not fit into memory."""

from __future__ import annotations

import dataclasses

import torch

from .batch import Batch
from .pack import PackedBatch
from .prompt import target_rows


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The first and the last rows of a batch, cut where the tokens of both sides are divided most evenly.

    Losses are sums over rows and counts are sums over rows, so the parts' add up to those of the batch.

    Raises:
        ValueError: the batch has less than two rows.
    """
    if batch.num_rows < 2:
        raise ValueError(f"batch: has {batch.num_rows} rows, at least 2 are needed to halve it")
    sides = [side for side in (batch.mt, batch.llm) if side is not None]
    per_row = [sum(lengths) for lengths in zip(*(side.pairs.lengths for side in sides), strict=True)]
    total, before, cut, least = sum(per_row), 0, 1, float("inf")
    for row, tokens in enumerate(per_row[:-1], 1):
        before += tokens
        if abs(total - 2 * before) < least:
            cut, least = row, abs(total - 2 * before)
    return _rows(batch, 0, cut), _rows(batch, cut, batch.num_rows)


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    mt, mt_first, mt_end = _packed(batch.mt, start, stop)
    llm, llm_first, _ = _packed(batch.llm, start, stop)
    mt_rows, llm_rows = batch.mt_rows, batch.llm_rows
    if batch.mt_rows is not None and batch.llm_rows is not None:
        # both tokens of a pair stand in one row, so one side tells
        own = (batch.mt_rows >= mt_first) & (batch.mt_rows < mt_end)
        mt_rows, llm_rows = batch.mt_rows[own] - mt_first, batch.llm_rows[own] - llm_first
    targets = _packed(batch.targets, start, stop)[0]
    if targets is not None and llm is not None:
        llm_rows = torch.from_numpy(target_rows(llm.lengths, targets.lengths)).to(llm.device)
    shared = batch.before is not None and batch.before.num_sequences == 1
    return dataclasses.replace(
        batch,
        mt=mt,
        llm=llm,
        mt_rows=mt_rows,
        llm_rows=llm_rows,
        labels=batch.labels[start:stop] if batch.labels is not None else None,
        mt_spans=batch.mt_spans[start:stop] - mt_first if batch.mt_spans is not None else None,
        llm_spans=batch.llm_spans[start:stop] - llm_first if batch.llm_spans is not None else None,
        ids=batch.ids[start:stop],
        targets=targets,
        before=batch.before if shared else _packed(batch.before, start, stop)[0],
        after=_packed(batch.after, start, stop)[0],
        row_weight=batch.row_weight[start:stop] if batch.row_weight is not None else None,
        soft_labels=batch.soft_labels[start:stop] if batch.soft_labels is not None else None,
    )


def _packed(side: PackedBatch | None, start: int, stop: int) -> tuple[PackedBatch | None, int, int]:
    """Sequences of the rows [start, stop) of a side, and the packed rows they stood in."""
    if side is None:
        return None, 0, 0
    start, stop = start * side.per_row, stop * side.per_row
    first, end = sum(side.lengths[:start]), sum(side.lengths[:stop])
    return (
        PackedBatch(
            side.input_ids[first:end],
            side.cu_seqlens[start : stop + 1] - first,
            side.positions[first:end],
            side.lengths[start:stop],
            side.partners,
        ),
        first,
        end,
    )
