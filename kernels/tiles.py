"""Tile and chunk sizes, as data: one table per op, one row per architecture.

`chunk_rows` is how many row pairs share one logits buffer; `block_v` is how many vocabulary entries one program (GPU)
or one GEMM call (CPU) handles at a time. An architecture that has no row of its own uses `default`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CpuChunks:
    """Sizes of the chunked CPU algorithm.

    Attributes:
        chunk_rows: row pairs per chunk. The GEMM repacks the head once per chunk, so fewer rows cost GEMM speed.
        block_v: vocabulary entries per GEMM call; a block of both rows' fp32 logits should stay in the L2/L3 cache.
        max_buffer_mib: upper limit of the two logits buffers together; `chunk_rows` shrinks to keep it.
    """

    chunk_rows: int
    block_v: int
    max_buffer_mib: int

    def rows_for(self, pairs: int, vocab: int, itemsize: int) -> int:
        """Row pairs per chunk for `pairs` pairs and `vocab` entries of `itemsize` bytes; at least 1."""
        fitting = (self.max_buffer_mib << 20) // max(1, 2 * vocab * itemsize)
        return max(1, min(pairs, self.chunk_rows, max(fitting, 32)))


LINEAR_KL_CPU = CpuChunks(chunk_rows=256, block_v=4096, max_buffer_mib=512)
