"""Triton: read the stored weight, add left @ right tile by tile, write it back rounded or requantised. No atomics.

bf16 is read and written as its 16 bits and rounded in integers, so that the interpreter computes it too.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..variants import Variant
from .reference import STEP, code_bounds


@dataclass(frozen=True)
class Config:
    """rows x cols of the weight per program (or per step along a row), block_r of the rank per product."""

    rows: int
    cols: int
    block_r: int
    num_warps: int
    num_stages: int


# The first is launched, the others wait for a GPU to tune on.
DENSE = (Config(64, 64, 16, 8, 3), Config(32, 64, 16, 4, 3), Config(32, 128, 32, 8, 3))
INT8 = (Config(16, 128, 16, 4, 3), Config(32, 64, 16, 4, 3), Config(16, 256, 16, 8, 3))
FOUR_BIT = (Config(32, 64, 16, 4, 3), Config(64, 64, 16, 8, 3), Config(64, 64, 32, 8, 3))  # cols: the block of 64
_ELEMENTS = 2048  # of a 4-bit tile whose blocks are not of 64


def four_bit_config(blocksize: int) -> Config:
    return Config(_ELEMENTS // blocksize, blocksize, 16, 4, 3)


@triton.jit
def update_tile(  # type: ignore[no-untyped-def]
    left_ptr,  # [rows, rank] fp32, or the dense [rows, cols] update where right_ptr is None
    right_ptr,  # [rank, cols] fp32
    i,
    j,
    rows,
    cols,
    rank,
    left_row,
    left_col,
    right_row,
    right_col,
    BLOCK_R: tl.constexpr,
):
    """The update at rows i, columns j; zero outside."""
    left_i = left_ptr + i.to(tl.int64)[:, None] * left_row
    if right_ptr is None:
        inside = (i[:, None] < rows) & (j[None, :] < cols)
        change = tl.load(left_i + j.to(tl.int64)[None, :] * left_col, mask=inside, other=0.0)
    else:
        right_j = right_ptr + j.to(tl.int64)[None, :] * right_col
        change = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
        for start in range(0, rank, BLOCK_R):
            k = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
            left = tl.load(left_i + k[None, :] * left_col, mask=(i[:, None] < rows) & (k[None, :] < rank), other=0.0)
            right = tl.load(right_j + k[:, None] * right_row, mask=(k[:, None] < rank) & (j[None, :] < cols), other=0.0)
            # ieee: tf32 would lose 1e-3 of the update, which is what this measures
            change = tl.dot(left, right, change, input_precision="ieee")
    return change


@triton.jit
def bf16_bits(values, random, STOCHASTIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 -> int16 bits of bf16: to nearest, ties to even, or up with the share of the 16 bits that are dropped."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    if STOCHASTIC:
        up = (bits + (random >> 16)) >> 16
        infinite = ((up & 0x7FFF) == 0x7F80) | ((rounded & 0x7FFF) == 0x7F80)
        rounded = tl.where(infinite, rounded, up)  # past the largest number chance decides nothing
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)  # NaN stays one
    return rounded.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def bf16_values(bits):  # type: ignore[no-untyped-def]
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def fp16_stochastic(values, random):  # type: ignore[no-untyped-def]
    """fp32 -> one of its two neighbours in fp16, subnormals included; what would overflow goes to the nearest."""
    nearest = values.to(tl.float16)
    size = tl.abs(values)
    bits = nearest.to(tl.int16, bitcast=True)
    # sign and magnitude: one bit less is nearer to zero
    low = tl.where(tl.abs(nearest.to(tl.float32)) > size, bits - 1, bits).to(tl.int16)
    high = (low + 1).to(tl.int16)
    below = tl.abs(low.to(tl.float16, bitcast=True).to(tl.float32))
    above = tl.abs(high.to(tl.float16, bitcast=True).to(tl.float32))
    uniform = (random >> 8).to(tl.float32) * (1.0 / 16777216)
    chosen = tl.where(uniform * (above - below) < size - below, high, low)
    return tl.where(above < float("inf"), chosen, bits).to(tl.float16, bitcast=True)


@triton.jit(do_not_specialize=["rank", "seed"])
def requantize_add_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,  # [rows, cols] fp32, fp16, or int16 bits of bf16; last dimension contiguous, as of all but the factors
    base_ptr,  # [rows, cols] fp32, or None: the weight itself
    left_ptr,
    right_ptr,
    new_ptr,  # [rows, cols] as weight
    total_ptr,  # [rows, cols] fp32, or None
    sums_ptr,  # [programs, 2] fp32: squares of what was missed and of the update
    rows,
    cols,
    rank,
    seed,
    weight_row,
    base_row,
    left_row,
    left_col,
    right_row,
    right_col,
    index_row,  # of the random numbers: an element's is the same in either orientation
    index_col,
    STOCHASTIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    program = tl.program_id(0)
    across = tl.cdiv(cols, BLOCK_COLS)
    i = (program // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = (program % across) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    change = update_tile(left_ptr, right_ptr, i, j, rows, cols, rank, left_row, left_col, right_row, right_col, BLOCK_R)
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    i64 = i.to(tl.int64)[:, None]
    stored = tl.load(weight_ptr + i64 * weight_row + j[None, :], mask=inside, other=0)
    old = bf16_values(stored) if stored.dtype == tl.int16 else stored.to(tl.float32)
    if base_ptr is None:
        total = old + change
    else:
        total = tl.load(base_ptr + i64 * base_row + j[None, :], mask=inside, other=0.0) + change
    out = i64 * cols + j[None, :]
    if total_ptr is not None:
        tl.store(total_ptr + out, total, mask=inside)
    random = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.uint32)
    if STOCHASTIC:
        index = i64 * index_row + j.to(tl.int64)[None, :] * index_col
        random = tl.randint(seed, index).to(tl.uint32, bitcast=True)
    if stored.dtype == tl.int16:
        new = bf16_bits(total, random, STOCHASTIC)
        written = bf16_values(new)
    elif stored.dtype == tl.float16:
        new = fp16_stochastic(total, random) if STOCHASTIC else total.to(tl.float16)
        written = new.to(tl.float32)
    else:
        new = total
        written = total
    tl.store(new_ptr + out, new, mask=inside)
    missed = (written - old) - change
    tl.store(sums_ptr + program * 2, tl.sum(missed * missed))
    tl.store(sums_ptr + program * 2 + 1, tl.sum(change * change))


@triton.jit(do_not_specialize=["rank"])
def requantize_add_4bit_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,  # [rows * blocks * BLOCKSIZE / 2] uint8, the first of two codes in the high bits
    absmax_ptr,  # [rows * blocks] fp32
    left_ptr,
    right_ptr,
    codes_ptr,  # [16] fp32, by their bits
    bounds_ptr,  # [15] fp32, between the sorted codes
    order_ptr,  # [16] int32, the bits of the sorted codes
    new_packed_ptr,
    new_absmax_ptr,
    moments_ptr,  # [rows * blocks, 4] fp32
    rows,
    blocks,  # of a row
    rank,
    left_row,
    left_col,
    right_row,
    right_col,
    BLOCK_ROWS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    HALF: tl.constexpr = BLOCKSIZE // 2
    program = tl.program_id(0)
    i = (program // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % blocks
    j = column * BLOCKSIZE + tl.arange(0, BLOCKSIZE)
    change = update_tile(
        left_ptr, right_ptr, i, j, rows, blocks * BLOCKSIZE, rank, left_row, left_col, right_row, right_col, BLOCK_R
    )
    change_0, change_1 = tl.split(tl.reshape(change, (BLOCK_ROWS, HALF, 2)))
    live = i < rows
    block = i.to(tl.int64) * blocks + column
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    stored = tl.load(packed_ptr + byte, mask=live[:, None], other=0).to(tl.int32)
    absmax = tl.load(absmax_ptr + block, mask=live, other=0.0)[:, None]
    value_0 = tl.load(codes_ptr + (stored >> 4)) * absmax + change_0
    value_1 = tl.load(codes_ptr + (stored & 15)) * absmax + change_1

    largest = tl.maximum(tl.max(tl.abs(value_0), 1), tl.max(tl.abs(value_1), 1))
    scale = tl.div_rn(1.0, tl.maximum(largest, 1.2e-38))[:, None]
    nearest_0 = tl.zeros((BLOCK_ROWS, HALF), dtype=tl.int32)
    nearest_1 = tl.zeros((BLOCK_ROWS, HALF), dtype=tl.int32)
    for n in tl.static_range(15):
        bound = tl.load(bounds_ptr + n)
        nearest_0 += (value_0 * scale > bound).to(tl.int32)
        nearest_1 += (value_1 * scale > bound).to(tl.int32)
    code_0 = tl.load(order_ptr + nearest_0)
    code_1 = tl.load(order_ptr + nearest_1)
    tl.store(new_packed_ptr + byte, ((code_0 << 4) | code_1).to(tl.uint8), mask=live[:, None])
    tl.store(new_absmax_ptr + block, largest, mask=live)

    # by these the error is known for any absmax, also one that is quantised later
    new_0 = tl.load(codes_ptr + code_0)
    new_1 = tl.load(codes_ptr + code_1)
    error_0 = new_0 * largest[:, None] - value_0
    error_1 = new_1 * largest[:, None] - value_1
    moments = moments_ptr + block * 4
    tl.store(moments, tl.sum(error_0 * error_0, 1) + tl.sum(error_1 * error_1, 1), mask=live)
    tl.store(moments + 1, tl.sum(new_0 * error_0, 1) + tl.sum(new_1 * error_1, 1), mask=live)
    tl.store(moments + 2, tl.sum(new_0 * new_0, 1) + tl.sum(new_1 * new_1, 1), mask=live)
    tl.store(moments + 3, tl.sum(change_0 * change_0, 1) + tl.sum(change_1 * change_1, 1), mask=live)


@triton.jit(do_not_specialize=["rank"])
def requantize_add_int8_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,  # [rows, cols] int8, last dimension contiguous
    scales_ptr,  # [rows] fp32
    left_ptr,
    right_ptr,
    new_codes_ptr,  # [rows, cols] int8, contiguous
    new_scales_ptr,
    sums_ptr,  # [programs, 2] fp32
    rows,
    cols,
    rank,
    codes_row,
    left_row,
    left_col,
    right_row,
    right_col,
    STEP: tl.constexpr,  # 1 / 127
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    program = tl.program_id(0)
    i = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = i < rows
    i64 = i.to(tl.int64)[:, None]
    scale = tl.load(scales_ptr + i, mask=live, other=0.0)[:, None]
    # two sweeps along the rows: the scale must be known before the first code; the second reads from the cache
    largest = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        j = start + tl.arange(0, BLOCK_COLS)
        inside = live[:, None] & (j[None, :] < cols)
        change = update_tile(
            left_ptr, right_ptr, i, j, rows, cols, rank, left_row, left_col, right_row, right_col, BLOCK_R
        )
        stored = tl.load(codes_ptr + i64 * codes_row + j[None, :], mask=inside, other=0)
        largest = tl.maximum(largest, tl.max(tl.abs(stored.to(tl.float32) * scale * STEP + change), 1))
    tl.store(new_scales_ptr + i, largest, mask=live)

    new_scale = largest[:, None]
    inverse = tl.where(new_scale > 0, tl.div_rn(127.0, tl.where(new_scale > 0, new_scale, 1.0)), 0.0)
    missed = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    asked = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        j = start + tl.arange(0, BLOCK_COLS)
        inside = live[:, None] & (j[None, :] < cols)
        change = update_tile(
            left_ptr, right_ptr, i, j, rows, cols, rank, left_row, left_col, right_row, right_col, BLOCK_R
        )
        stored = tl.load(codes_ptr + i64 * codes_row + j[None, :], mask=inside, other=0)
        old = stored.to(tl.float32) * scale * STEP
        # + 1.5 * 2^23 leaves no bit below 1: to nearest, ties to even
        code = ((old + change) * inverse + 12582912.0) - 12582912.0
        tl.store(new_codes_ptr + i64 * cols + j[None, :], code.to(tl.int8), mask=inside)
        error = (code * new_scale * STEP - old) - change
        missed += tl.sum(error * error, 1)
        asked += tl.sum(change * change, 1)
    tl.store(sums_ptr + program * 2, tl.sum(missed))
    tl.store(sums_ptr + program * 2 + 1, tl.sum(asked))


def _factors(left: torch.Tensor, right: torch.Tensor | None) -> dict[str, int]:
    row, col = (0, 0) if right is None else right.stride()
    return {
        "rank": 0 if right is None else left.shape[1],
        "left_row": left.stride(0),
        "left_col": left.stride(1),
        "right_row": row,
        "right_col": col,
    }


def requantize_add(
    W: torch.Tensor,
    base: torch.Tensor | None,
    left: torch.Tensor,
    right: torch.Tensor | None,
    seed: int | None,
    keep_total: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Launch on ``W: [d_out, d_in]`` fp32, fp16 or int16 bits of bf16, in either orientation; no element, no launch."""
    turned = W.stride(1) != 1 and W.stride(0) == 1  # Conv1D: a tile's columns must lie together in memory
    index = W.shape[1], 1
    if turned:
        W, base, index = W.T, None if base is None else base.T, index[::-1]
        left, right = (left.T, None) if right is None else (right.T, left.T)
    W = W if W.stride(1) == 1 else W.contiguous()
    base = base if base is None or base.stride(1) == 1 else base.contiguous()
    config = config or DENSE[0]
    rows, cols = W.shape
    programs = triton.cdiv(rows, config.rows) * triton.cdiv(cols, config.cols)
    new = torch.empty_like(W, memory_format=torch.contiguous_format)
    total = torch.empty_like(new, dtype=torch.float32) if keep_total else None
    sums = torch.empty(programs, 2, dtype=torch.float32, device=W.device)
    with torch.cuda.device_of(W):
        requantize_add_kernel[(programs,)](
            W,
            base,
            left,
            right,
            new,
            total,
            sums,
            rows,
            cols,
            seed=seed or 0,
            weight_row=W.stride(0),
            base_row=0 if base is None else base.stride(0),
            **_factors(left, right),
            index_row=index[0],
            index_col=index[1],
            STOCHASTIC=seed is not None,
            BLOCK_ROWS=config.rows,
            BLOCK_COLS=config.cols,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return (new.T, None if total is None else total.T, sums) if turned else (new, total, sums)


def requantize_add_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    quant_type: str,
    blocksize: int,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on ``packed: [n / 2] uint8`` and ``absmax: [n / blocksize] fp32``, contiguous, rows of whole blocks."""
    rows = left.shape[0]
    blocks = len(absmax) // rows
    config = config or (FOUR_BIT[0] if blocksize == 64 else four_bit_config(blocksize))
    new_packed, new_absmax = torch.empty_like(packed), torch.empty_like(absmax)
    moments = torch.empty(len(absmax), 4, dtype=torch.float32, device=packed.device)
    with torch.cuda.device_of(packed):
        requantize_add_4bit_kernel[(triton.cdiv(rows, config.rows) * blocks,)](
            packed,
            absmax,
            left,
            right,
            *code_bounds(quant_type, packed.device),
            new_packed,
            new_absmax,
            moments,
            rows,
            blocks,
            **_factors(left, right),
            BLOCK_ROWS=config.rows,
            BLOCKSIZE=blocksize,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return new_packed, new_absmax, moments


def requantize_add_int8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on ``codes: [rows, cols] int8``, last dimension contiguous, and ``scales: [rows] fp32``."""
    config = config or INT8[0]
    rows, cols = codes.shape
    programs = triton.cdiv(rows, config.rows)
    new_codes = torch.empty_like(codes, memory_format=torch.contiguous_format)
    new_scales = torch.empty_like(scales)
    sums = torch.empty(programs, 2, dtype=torch.float32, device=codes.device)
    with torch.cuda.device_of(codes):
        requantize_add_int8_kernel[(programs,)](
            codes,
            scales,
            left,
            right,
            new_codes,
            new_scales,
            sums,
            rows,
            cols,
            codes_row=codes.stride(0),
            **_factors(left, right),
            STEP=STEP,
            BLOCK_ROWS=config.rows,
            BLOCK_COLS=config.cols,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return new_codes, new_scales, sums


def variants() -> list[Variant]:
    """What gate B compiles: every configuration, with factors as the engine makes them."""
    factors = {"left_ptr": "*fp32", "right_ptr": "*fp32"}
    unit = {"left_col": 1, "right_col": 1}
    even = ("left_ptr", "right_ptr", "left_row", "right_row", "rows")
    found = []

    def add(name: str, config: Config, default: bool, **variant: Any) -> None:
        constants = {"BLOCK_ROWS": config.rows, "BLOCK_R": config.block_r} | variant.pop("constants")
        tile = f"{config.rows}x{config.cols}x{config.block_r}-w{config.num_warps}-s{config.num_stages}"
        found.append(
            Variant(
                name=f"requantize_add-{name}-{tile}",
                constants=constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                default=default,
                **variant,
            )
        )

    for config in DENSE:
        first = config is DENSE[0]
        for dtype, pointer in (("bf16", "*i16"), ("fp16", "*fp16"), ("fp32", "*fp32")):
            types = {"weight_ptr": pointer, "new_ptr": pointer, "sums_ptr": "*fp32", "seed": "i64"}
            running = {"base_ptr": "*fp32", "total_ptr": "*fp32"}
            aligned = ("weight_ptr", "new_ptr", "sums_ptr", "cols", "weight_row")
            block = {"BLOCK_COLS": config.cols, "index_col": 1}
            add(
                f"{dtype}-nearest-running",
                config,
                first,
                kernel=requantize_add_kernel,
                types=types | factors | running,
                constants=block | unit | {"STOCHASTIC": False},
                aligned=(*aligned, *even, *running, "base_row"),
            )
            if dtype != "fp32":  # alone, no multiple of 16 anywhere
                add(
                    f"{dtype}-stochastic-ragged",
                    config,
                    first,
                    kernel=requantize_add_kernel,
                    types=types | factors,
                    constants=block | unit | {"STOCHASTIC": True, "base_ptr": None, "total_ptr": None},
                    aligned=("weight_ptr", "new_ptr", "left_ptr", "right_ptr"),
                )
        add(  # Conv1D
            "fp16-nearest-turned",
            config,
            first,
            kernel=requantize_add_kernel,
            types={"weight_ptr": "*fp16", "new_ptr": "*fp16", "sums_ptr": "*fp32", "seed": "i64"} | factors,
            constants={"BLOCK_COLS": config.cols, "index_row": 1, "left_row": 1, "right_row": 1, "STOCHASTIC": False}
            | dict.fromkeys(("base_ptr", "total_ptr")),
            aligned=("weight_ptr", "new_ptr", "left_ptr", "right_ptr", "rows", "cols", "weight_row"),
        )
        add(
            "bf16-nearest-dense",
            config,
            first,
            kernel=requantize_add_kernel,
            types={"weight_ptr": "*i16", "new_ptr": "*i16", "sums_ptr": "*fp32", "left_ptr": "*fp32", "seed": "i64"},
            constants={"BLOCK_COLS": config.cols, "index_col": 1, "left_col": 1, "STOCHASTIC": False}
            | dict.fromkeys(("right_ptr", "base_ptr", "total_ptr")),
            aligned=("weight_ptr", "new_ptr", "left_ptr", "rows", "cols", "weight_row", "left_row"),
        )
    for config in (*FOUR_BIT, *(four_bit_config(blocksize) for blocksize in (32, 128, 256))):
        stored = {"packed_ptr": "*u8", "absmax_ptr": "*fp32", "new_packed_ptr": "*u8", "new_absmax_ptr": "*fp32"}
        tables = {"codes_ptr": "*fp32", "bounds_ptr": "*fp32", "order_ptr": "*i32"}
        add(
            "4bit",
            config,
            config is FOUR_BIT[0],
            kernel=requantize_add_4bit_kernel,
            types=stored | tables | factors | {"moments_ptr": "*fp32"},
            constants=unit | {"BLOCKSIZE": config.cols},
            aligned=(*stored, *tables, *even, "moments_ptr"),
        )
    for config in INT8:
        stored = {"codes_ptr": "*i8", "scales_ptr": "*fp32", "new_codes_ptr": "*i8", "new_scales_ptr": "*fp32"}
        add(
            "int8",
            config,
            config is INT8[0],
            kernel=requantize_add_int8_kernel,
            types=stored | factors | {"sums_ptr": "*fp32"},
            constants=unit | {"BLOCK_COLS": config.cols, "STEP": STEP},
            aligned=(*stored, *even, "cols", "codes_row", "sums_ptr"),
        )
    return found
