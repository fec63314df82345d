"""Tile and chunk sizes, as data: one table per op, one row per architecture.

`chunk_rows` is how many row pairs share one logits buffer; `block_v` is how many vocabulary entries one program (GPU)
or one GEMM call (CPU) handles at a time. An architecture that has no row of its own uses `default`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

Row = TypeVar("Row")


@dataclass(frozen=True)
class CpuChunks:
    """Sizes of the chunked CPU algorithm.

    Attributes:
        chunk_rows: row pairs per chunk. The GEMM repacks the head once per chunk, so fewer rows cost GEMM speed.
        block_v: vocabulary entries per GEMM call; a block of both rows' logits should stay in the last-level cache
            (8 MiB here); larger blocks mean fewer parallel regions, which matters only when the cores are shared.
        max_buffer_mib: upper limit of the two logits buffers together; `chunk_rows` shrinks to keep it.
    """

    chunk_rows: int
    block_v: int
    max_buffer_mib: int

    def rows_for(self, pairs: int, vocab: int, itemsize: int, sides: int = 2) -> int:
        """Rows per chunk for `pairs` rows with `sides` buffers of `vocab` logits of `itemsize` bytes; at least 1."""
        fitting = (self.max_buffer_mib << 20) // max(1, sides * vocab * itemsize)
        return max(1, min(pairs, 2 * self.chunk_rows // sides, max(fitting, 32)))


LINEAR_KL_CPU = CpuChunks(chunk_rows=256, block_v=4096, max_buffer_mib=512)


@dataclass(frozen=True)
class RowTile:
    """A row kernel's tile: `block` entries per step of one program."""

    block: int
    num_warps: int
    num_stages: int = 1

    @property
    def launch(self) -> dict[str, int]:
        """Options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class LinearKLTiles:
    """Sizes of the CUDA/HIP path of `linear_kl`.

    Attributes:
        chunk_rows: row pairs per GEMM. 1024 rows of a 4096-wide dX give a GEMM 128 tiles of 256x128, one per SM.
        kl_rows, exp_rows: tiles over the vocabulary. 8 fp32 entries per thread and row are two 128-bit loads, and
            `kl_rows` (forward, 40 registers on sm_90) has six programs of 256 threads on an SM: 96 KiB in flight.
        finish_moments: tile over the LLM width.
        head_rows: rows whose logit gradients are kept for one GEMM of dW, where all rows are too many. Adding to dW in
            fp32 reads and writes 8 V D bytes, whatever the rows, next to 2 V D FLOPs each: at F FLOP/s and B bytes/s it
            costs the GEMM 4 F / (B rows) more, on an H200 72 % with 1,024 rows and 18 % with 4,096 (1 GB at V=128k).
    """

    chunk_rows: int
    kl_rows: RowTile
    exp_rows: RowTile
    finish_moments: RowTile
    head_rows: int = 4096

    def rows_of_dw(self, pairs: int, width: int, dtype: torch.dtype) -> int:
        """Rows per GEMM of dW: all, where their gradients need no more memory than the sum of dW in fp32 (4 V D)."""
        all_fit = dtype == torch.bfloat16 and 2 * pairs <= 4 * width
        if all_fit or pairs <= self.head_rows:
            return pairs
        return max(1, self.head_rows // self.chunk_rows) * self.chunk_rows


def padded_vocabulary(vocab: int) -> int:
    """Row stride of a logits buffer: a multiple of 128 bytes, so that rows start where wide loads and GEMMs like it."""
    return -(-vocab // 64) * 64


_WIDE = LinearKLTiles(1024, RowTile(2048, 8), RowTile(4096, 8), RowTile(1024, 4))
LINEAR_KL: dict[str, LinearKLTiles] = {
    "default": _WIDE,
    "sm_80": _WIDE,
    "sm_90": _WIDE,
    "sm_100": LinearKLTiles(2048, RowTile(2048, 8), RowTile(4096, 8), RowTile(1024, 4)),
    "gfx942": LinearKLTiles(2048, RowTile(2048, 4), RowTile(4096, 8), RowTile(1024, 4)),
}


@dataclass(frozen=True)
class StateTile:
    """`rows` rows of states per step of one program, whole rows in registers, `stages - 1` further steps in flight."""

    rows: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class HiddenMSETiles:
    """Sizes of the CUDA/HIP path of `hidden_mse`.

    Attributes:
        piece: rows of a segment that one program sums. Fewer rows give more programs and more fp32 partial sums, which
            cost `8 / (piece * itemsize)` of the traffic.
        gradient_piece: rows of a segment whose gradient one program writes.
        finish_block: states per program when the partial sums of `segment_mean` are combined.
        values_per_thread: fp32 numbers of a tile in one thread's registers.
        compare_block: states per step when the partial sums of both sides are combined and compared. There is one
            program per segment, often fewer than SMs, so each must have many loads in flight.
        ahead: bytes of rows that one program has in flight. A pack of 8k tokens has one or two programs of `pool_rows`
            per SM, and 35 KiB per SM keep an H200's memory busy (4.3 TB/s, 1 µs, 132 SMs).
    """

    piece: int
    gradient_piece: int
    finish_block: int
    values_per_thread: int
    compare_block: int = 4096
    ahead: int = 32 << 10

    def for_width(self, width: int, itemsize: int = 2) -> StateTile:
        """The tile for rows of `width` states, a power of 2, of `itemsize` bytes."""
        num_warps = min(16, max(4, width * max(itemsize // 2, 1) // (32 * self.values_per_thread)))
        rows = max(1, num_warps * 32 * self.values_per_thread // max(width, 1) // 2)
        return StateTile(rows, num_warps, min(6, 1 + self.ahead // max(rows * width * itemsize, 1)))


HIDDEN_MSE: dict[str, HiddenMSETiles] = {
    "default": HiddenMSETiles(64, 16, 1024, 16),
    "sm_80": HiddenMSETiles(64, 16, 1024, 16),
    "sm_90": HiddenMSETiles(64, 16, 1024, 16),
    "sm_100": HiddenMSETiles(64, 32, 1024, 16),
    "gfx942": HiddenMSETiles(64, 16, 1024, 32),
}


@dataclass(frozen=True)
class GemmTile:
    """`block_t` rows by `block_d` columns of the result per program, `block_e` of the inner dimension per step."""

    block_t: int
    block_d: int
    block_e: int
    group_t: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProjectionTiles:
    """Sizes of the CUDA/HIP path of `packed_projection`.

    Attributes:
        gemm: tile of the fused GEMM.
        activated: the same for a hidden layer, whose epilogue needs more registers.
        fused_up_to: widths of the input up to this one, times the passes over the result that the library's GEMM would
            need behind it, take the fused GEMM. A pass reads and writes 4 T D bytes, the product is 2 T E D FLOPs: at F
            FLOP/s and B bytes/s it pays up to E = 2 F / (f B), where f is by how much the Triton GEMM is slower.
            Arithmetic, not yet timed: f is 0.1 to 0.2 expected on Ampere, and 0.6 for a Triton GEMM of Hopper's
            (790 TFLOP/s, 4.3 TB/s: 612).
    """

    gemm: GemmTile
    activated: GemmTile
    fused_up_to: int


_SQUARE = GemmTile(128, 128, 64, 8, 8, 3)
_WIDE_GEMM = GemmTile(128, 256, 64, 8, 8, 4)
_DEEP = GemmTile(128, 128, 128, 8, 8, 2)  # the other two spill on sm_100
_HIP = GemmTile(256, 128, 32, 8, 8, 2)
PACKED_PROJECTION: dict[str, ProjectionTiles] = {
    "default": ProjectionTiles(_SQUARE, _SQUARE, 2048),
    "sm_80": ProjectionTiles(_SQUARE, _SQUARE, 2048),
    "sm_90": ProjectionTiles(_WIDE_GEMM, _SQUARE, 512),
    "sm_100": ProjectionTiles(_DEEP, _DEEP, 512),
    "gfx942": ProjectionTiles(_HIP, _HIP, 2048),
}


def row_of(table: dict[str, Row], key: str | torch.device) -> Row:
    """The row of an architecture, or of the GPU that tensors on a device are on."""
    if isinstance(key, torch.device):
        key = architecture() if key.type == "cuda" else "default"
    return table.get(key, table["default"])


def architecture() -> str:
    """Key of the current device in the tables: "sm_90", "gfx942", ..., "default" without one."""
    if not torch.cuda.is_available():
        return "default"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
