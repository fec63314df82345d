"""Specialisations of the kernels of `hidden_mse`, `packed_projection` and `fp8_linear` for the gate in `aot.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from . import fp8_linear_triton, hidden_mse_triton, packed_projection_triton
from .tiles import HIDDEN_MSE, PACKED_PROJECTION, RowTile

WIDTHS = (1024, 4096)
FLOATS = ("eps", "scale")
INDICES = {"bounds_s_ptr", "bounds_t_ptr", "edges_ptr", "edges_s_ptr", "edges_t_ptr"}
LONG_INDICES = {"order_ptr", "position_ptr", "position_s_ptr", "position_t_ptr", "rows_ptr", "rows_s_ptr", "rows_t_ptr",
                "pair_edges_ptr", "pair_order_ptr", "out_rows_ptr"}  # fmt: skip
NOT_DIVISIBLE = ("rows", "intervals", "segments", "pairs", "tokens", "count_s", "count_t", "rows_s", "rows_t")


def _case(
    make: Callable[..., Any], kernel: Any, label: str, halves: dict[str, str], tile: RowTile, gemm: bool = False,
    streams: bool = True, **constexprs: Any,
) -> Any:  # fmt: skip
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name in INDICES:
            types[name] = "*i32"
        elif name in LONG_INDICES:
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = "*" + halves.get(name, "fp32")
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    divisible = tuple(
        name for name, kind in types.items() if kind[0] == "*" or (kind == "i32" and name not in NOT_DIVISIBLE)
    )
    return make(kernel, label, types, constexprs, tile, divisible, gemm, streams)


def hidden_mse_cases(make: Callable[..., Any], arch: str) -> Iterator[Any]:
    """The streaming kernels, with every norm and dtype at a width of 4096 and with one of each at 1024."""
    tiles = HIDDEN_MSE.get(arch, HIDDEN_MSE["default"])
    for width in WIDTHS:
        for dtype in ("bf16", "fp16", "fp32") if width == WIDTHS[-1] else ("bf16",):
            tile = tiles.for_width(width, 4 if dtype == "fp32" else 2)
            row = RowTile(width, tile.num_warps)
            for norm in ("none", "rms", "layer"):
                yield _case(
                    make, hidden_mse_triton.pool_rows, f"{dtype} {norm} D={width}", {"x_ptr": dtype}, row,
                    NORM=norm, STORE_STATS=norm != "none", IS_CU=True, PIECE=tiles.piece, ROWS=tile.rows,
                    STAGES=tile.stages, BLOCK_D=width,
                )  # fmt: skip
                yield _case(
                    make, hidden_mse_triton.state_gradient, f"pooled {dtype} {norm} D={width}",
                    {"dx_ptr": dtype, "x_ptr": dtype, "t_ptr": dtype, "more_ptr": dtype}, row,
                    NORM=norm, HAS_POOL=True, HAS_PAIRS=False, HAS_WEIGHT=False, COSINE=False, HAS_MORE=False,
                    IS_CU=True, PIECE=tiles.gradient_piece, STAGES=min(tile.stages, 3), BLOCK_D=width,
                )  # fmt: skip
            for cosine in (False, True):
                kind = "cosine" if cosine else "mse"
                yield _case(
                    make, hidden_mse_triton.pair_values, f"{kind} {dtype} +weight D={width}",
                    {"s_ptr": dtype, "t_ptr": dtype}, row, HAS_WEIGHT=True, COSINE=cosine, BLOCK_D=width,
                )  # fmt: skip
                yield _case(
                    make, hidden_mse_triton.state_gradient, f"pooled {kind} more {dtype} D={width}",
                    {"dx_ptr": dtype, "x_ptr": dtype, "t_ptr": dtype, "more_ptr": dtype}, row,
                    NORM="none", HAS_POOL=True, HAS_PAIRS=True, HAS_WEIGHT=True, COSINE=cosine, HAS_MORE=True,
                    IS_CU=False, PIECE=tiles.gradient_piece, STAGES=min(tile.stages, 3), BLOCK_D=width,
                )  # fmt: skip
    block = RowTile(tiles.finish_block, 4)
    compare = RowTile(tiles.compare_block, 8)
    for is_cu in (True, False):
        kind = "cu_seqlens" if is_cu else "spans"
        yield _case(
            make, hidden_mse_triton.pool_finish, kind, {}, block, IS_CU=is_cu, PIECE=tiles.piece, BLOCK_D=block.block
        )
        yield _case(
            make, hidden_mse_triton.pool_compare, f"{kind} +weight +norm", {}, compare,
            HAS_WEIGHT=True, HAS_NORM_WEIGHT=True, NEED_U=True, NEED_NORM=True, IS_CU_S=is_cu, IS_CU_T=is_cu,
            PIECE=tiles.piece, BLOCK_D=compare.block,
        )  # fmt: skip
        yield _case(
            make, hidden_mse_triton.check_bounds, kind, {"good_ptr": "i1"}, RowTile(1024, 4), streams=False,
            SPANS=not is_cu, BLOCK=1024,
        )  # fmt: skip


def packed_projection_cases(make: Callable[..., Any], arch: str) -> Iterator[Any]:
    """The fused GEMM with each epilogue, and its preparation."""
    tiles = PACKED_PROJECTION.get(arch, PACKED_PROJECTION["default"])
    for dtype in ("bf16", "fp16"):
        halves = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "pre_ptr", "out_ptr", "folded_ptr"), dtype)
        halves |= dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr"), dtype)
        for norm, activation in (("none", "none"), ("rms", "none"), ("layer", "none"), ("layer", "gelu")):
            gemm = tiles.gemm if activation == "none" else tiles.activated
            yield _case(
                make, packed_projection_triton.projection_gemm, f"{dtype} {norm} {activation} +rows +bias", halves,
                RowTile(gemm.block_t, gemm.num_warps, gemm.num_stages), gemm=True,
                NORM=norm, ACTIVATION=activation, HAS_ROWS=True, HAS_OUT_ROWS=activation == "none", HAS_BIAS=True,
                STORE_PRE=activation != "none", UPCAST=False, EVEN_E=True, BLOCK_T=gemm.block_t, BLOCK_D=gemm.block_d,
                BLOCK_E=gemm.block_e, GROUP_T=gemm.group_t,
            )  # fmt: skip
        folding = {k: v for k, v in halves.items() if k != "bias_ptr"} | {"bias_ptr": dtype}
        yield _case(
            make, packed_projection_triton.fold_norm, f"{dtype} E=1024", folding, RowTile(1024, 2),
            HAS_BIAS=True, HAS_WEIGHT=True, HAS_NORM_BIAS=True, BLOCK_E=1024,
        )  # fmt: skip
        for store in (False, True):
            yield _case(
                make, packed_projection_triton.norm_rows, f"{dtype} layer {'rows' if store else 'statistics'} E=1024",
                halves, RowTile(1024, 2),
                NORM="layer", HAS_ROWS=True, HAS_WEIGHT=store, HAS_BIAS=store, STORE_ROWS=store, BLOCK_E=1024,
            )  # fmt: skip


def fp8_linear_cases(make: Callable[..., Any], arch: str) -> Iterator[Any]:
    """Rows to e4m3, whole and in blocks, where the hardware has that format."""
    if arch not in ("sm_90", "sm_100"):
        return
    for width in (*WIDTHS, 16384):
        for dtype in ("bf16", "fp16", "fp32") if width == WIDTHS[-1] else ("bf16",):
            for whole in (True, False) if width == 16384 else (True,):
                yield _case(
                    make, fp8_linear_triton.fp8_rows, f"{dtype} {'row' if whole else 'block'} of {width}",
                    {"x_ptr": dtype, "q_ptr": "fp8e4nv"}, RowTile(width, fp8_linear_triton.warps(width)),
                    WHOLE=whole, BLOCK_K=width,
                )  # fmt: skip
