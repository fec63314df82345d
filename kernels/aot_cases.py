"""Specialisations of the kernels for the gate in `aot.py`: what runs can ask for, up to unused flag combinations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton import JITFunction

from . import fp8_linear_triton, hidden_mse_triton, linear_ce_triton, linear_kl_triton, packed_projection_triton
from .tiles import HIDDEN_MSE, LINEAR_KL, PACKED_PROJECTION, RowTile, row_of

WIDTHS = (1024, 4096)
FLOATS = {"eps", "inv_temperature", "softcap", "smoothing", "scale", "beta", "grad_scale", "e_scale"}
INDICES = {"bounds_s_ptr", "bounds_t_ptr", "edges_ptr", "edges_s_ptr", "edges_t_ptr"}
LONG_INDICES = {"order_ptr", "position_ptr", "position_s_ptr", "position_t_ptr", "rows_ptr", "rows_s_ptr", "rows_t_ptr",
                "pair_edges_ptr", "pair_order_ptr", "out_rows_ptr", "targets_ptr"}  # fmt: skip
NOT_DIVISIBLE = {"rows", "intervals", "segments", "pairs", "tokens", "count_s", "count_t", "rows_s", "rows_t", "vocab",
                 "first_row"}  # fmt: skip
Value = bool | int | str


@dataclass(frozen=True)
class Case:
    """One kernel in one specialisation.

    Attributes:
        kernel: the jitted function.
        label: what is special about it.
        types: argument types by name, as in Triton signatures; the others are constexprs.
        constexprs: values of the constexpr arguments.
        tile: warps and stages.
        divisible: arguments that are multiples of 16 (for pointers: 16-byte aligned), as at run time.
        gemm: the kernel contains `tl.dot`.
        rows: it reads rows, as wide as can be; a kernel over bounds does not.
    """

    kernel: JITFunction
    label: str
    types: dict[str, str]
    constexprs: dict[str, Value]
    tile: RowTile
    divisible: tuple[str, ...]
    gemm: bool = False
    rows: bool = True


def _case(
    kernel: JITFunction,
    label: str,
    pointers: dict[str, str],
    tile: RowTile,
    gemm: bool = False,
    rows: bool = True,
    **constexprs: Value,
) -> Case:
    """`pointers`: what is not fp32 and not an index."""
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            index = "i32" if name in INDICES else "i64" if name in LONG_INDICES else "fp32"
            types[name] = "*" + pointers.get(name, index)
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    divisible = [n for n, kind in types.items() if kind[0] == "*" or (kind == "i32" and n not in NOT_DIVISIBLE)]
    return Case(kernel, label, types, constexprs, tile, tuple(divisible), gemm, rows)


def linear_kl_cases(arch: str) -> Iterator[Case]:
    """The row kernels with every divergence and dtype, with and without bias, soft-capping and weights."""
    tiles = row_of(LINEAR_KL, arch)
    rows, exps, finish = tiles.kl_rows, tiles.exp_rows, tiles.finish_moments

    def pair(label: str, dtype: str, divergence: str, barrier: bool, extras: bool) -> Case:
        flags = dict.fromkeys(("HAS_BIAS_S", "HAS_BIAS_T", "HAS_WEIGHT", "HAS_SOFTCAP"), extras)
        flags |= {"NEED_GRAD": True, "BARRIER": barrier}
        kernel = linear_kl_triton.kl_rows
        return _case(kernel, label, {"grad_ptr": dtype}, rows, DIVERGENCE=divergence, BLOCK_V=rows.block, **flags)

    for divergence in ("forward", "reverse", "jsd"):
        for dtype in ("bf16", "fp16", "fp32") if divergence == "forward" else ("bf16",):
            for extras in (False, True):
                label = f"{divergence} {dtype}{' +bias +softcap +weight' if extras else ''}"
                yield pair(label, dtype, divergence, dtype != "fp32", extras)
    yield pair("forward bf16, trained head", "bf16", "forward", False, False)
    for dtype in ("bf16", "fp16", "fp32"):
        for teacher in (False, True):
            label = f"{'teacher +bias +softcap' if teacher else 'student'} {dtype}"
            flags = dict.fromkeys(("HAS_BIAS", "HAS_VALUE_BIAS", "HAS_SOFTCAP", "WANT_ENTROPY"), teacher)
            flags["BARRIER"] = dtype != "fp32"
            yield _case(linear_kl_triton.exp_rows, label, {"e_ptr": dtype}, exps, BLOCK_V=exps.block, **flags)
    for dtype in ("bf16", "fp32"):
        flags = dict.fromkeys(("HAS_ROWS", "HAS_WEIGHT", "NEED_GRAD"), True)
        pointers, kernel = {"x_ptr": dtype, "dx_ptr": dtype}, linear_kl_triton.finish_moments
        yield _case(kernel, f"{dtype} +rows +weight", pointers, finish, BLOCK_D=finish.block, **flags)


def linear_ce_cases(arch: str) -> Iterator[Case]:
    """The row kernel in each dtype, alone and with everything."""
    tile = row_of(LINEAR_KL, arch).kl_rows
    for dtype in ("bf16", "fp16", "fp32"):
        for extras in (False, True):
            flags = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "HAS_SMOOTHING"), extras)
            flags |= {"NEED_GRAD": True, "BARRIER": dtype != "fp32"}
            label, pointers = f"{dtype}{' +bias +softcap +smoothing' if extras else ''}", {"grad_ptr": dtype}
            yield _case(linear_ce_triton.ce_rows, label, pointers, tile, BLOCK_V=tile.block, **flags)


def hidden_mse_cases(arch: str) -> Iterator[Case]:
    """The streaming kernels, in every dtype at a width of 4096 and in one at 1024."""
    tiles = row_of(HIDDEN_MSE, arch)
    for width in WIDTHS:
        for dtype in ("bf16", "fp16", "fp32") if width == WIDTHS[-1] else ("bf16",):
            tile = tiles.for_width(width, 4 if dtype == "fp32" else 2)
            row = RowTile(width, tile.num_warps)
            pointers = dict.fromkeys(("dx_ptr", "x_ptr", "t_ptr", "more_ptr"), dtype)
            gradient: dict[str, Any] = {"PIECE": tiles.gradient_piece, "STAGES": min(tile.stages, 3), "BLOCK_D": width}
            yield _case(
                hidden_mse_triton.pool_rows, f"{dtype} D={width}", {"x_ptr": dtype}, row,
                IS_CU=True, PIECE=tiles.piece, ROWS=tile.rows, STAGES=tile.stages, BLOCK_D=width,
            )  # fmt: skip
            for pairs, more in ((False, False), (False, True), (True, True)):
                label = f"pooled{' +pairs +weight' * pairs}{' +more' * more} {dtype} D={width}"
                parts: dict[str, Any] = {"HAS_POOL": True, "HAS_PAIRS": pairs, "HAS_WEIGHT": pairs, "HAS_MORE": more}
                kernel = hidden_mse_triton.state_gradient
                yield _case(kernel, label, pointers, row, IS_CU=not pairs, **parts, **gradient)
            pair = {"s_ptr": dtype, "t_ptr": dtype}
            label = f"{dtype} +weight D={width}"
            yield _case(hidden_mse_triton.pair_values, label, pair, row, HAS_WEIGHT=True, BLOCK_D=width)
    block = RowTile(tiles.finish_block, 4)
    compare = RowTile(tiles.compare_block, 8)
    for is_cu in (True, False):
        kind = "cu_seqlens" if is_cu else "spans"
        yield _case(hidden_mse_triton.pool_finish, kind, {}, block, IS_CU=is_cu, PIECE=tiles.piece, BLOCK_D=block.block)
        yield _case(
            hidden_mse_triton.pool_compare, f"{kind} +weight", {}, compare,
            HAS_WEIGHT=True, NEED_U=True, IS_CU_S=is_cu, IS_CU_T=is_cu, PIECE=tiles.piece, BLOCK_D=compare.block,
        )  # fmt: skip
        yield _case(
            hidden_mse_triton.check_bounds,
            kind,
            {"good_ptr": "i1"},
            RowTile(1024, 4),
            rows=False,
            SPANS=not is_cu,
            BLOCK=1024,
        )


def packed_projection_cases(arch: str) -> Iterator[Case]:
    """The fused GEMM with each epilogue, and its preparation."""
    tiles = row_of(PACKED_PROJECTION, arch)
    for dtype in ("bf16", "fp16"):
        halves = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "pre_ptr", "out_ptr", "folded_ptr"), dtype)
        halves |= dict.fromkeys(("norm_weight_ptr", "norm_bias_ptr"), dtype)
        for norm, activation in (("none", "none"), ("rms", "none"), ("layer", "none"), ("layer", "gelu")):
            gemm = tiles.gemm if activation == "none" else tiles.activated
            yield _case(
                packed_projection_triton.projection_gemm, f"{dtype} {norm} {activation} +rows +bias", halves,
                RowTile(gemm.block_t, gemm.num_warps, gemm.num_stages), gemm=True,
                NORM=norm, ACTIVATION=activation, HAS_ROWS=True, HAS_OUT_ROWS=activation == "none", HAS_BIAS=True,
                STORE_PRE=activation != "none", UPCAST=False, EVEN_E=True, BLOCK_T=gemm.block_t, BLOCK_D=gemm.block_d,
                BLOCK_E=gemm.block_e, GROUP_T=gemm.group_t,
            )  # fmt: skip
        yield _case(
            packed_projection_triton.fold_norm, f"{dtype} E=1024", halves | {"bias_ptr": dtype}, RowTile(1024, 2),
            HAS_BIAS=True, HAS_WEIGHT=True, HAS_NORM_BIAS=True, BLOCK_E=1024,
        )  # fmt: skip
        for store in (False, True):
            yield _case(
                packed_projection_triton.norm_rows, f"{dtype} layer {'rows' if store else 'statistics'} E=1024",
                halves, RowTile(1024, 2),
                NORM="layer", HAS_ROWS=True, HAS_WEIGHT=store, HAS_BIAS=store, STORE_ROWS=store, BLOCK_E=1024,
            )  # fmt: skip


def fp8_linear_cases(arch: str) -> Iterator[Case]:
    """Rows to e4m3, whole and in blocks, where the hardware has that format."""
    if arch not in ("sm_90", "sm_100"):
        return
    for width in (*WIDTHS, 16384):
        for dtype in ("bf16", "fp16", "fp32") if width == WIDTHS[-1] else ("bf16",):
            for whole in (True, False) if width == 16384 else (True,):
                yield _case(
                    fp8_linear_triton.fp8_rows,
                    f"{dtype} {'row' if whole else 'block'} of {width}",
                    {"x_ptr": dtype, "q_ptr": "fp8e4nv"},
                    RowTile(width, fp8_linear_triton.warps(width)),
                    WHOLE=whole,
                    BLOCK_K=width,
                )
