"""Triton: y += x rightᵀ leftᵀ, each row by its own factors. Shrink reads x once, expand reads and writes y once.

Two launches, not one: shrink does not need y, so that it can run beside the product that makes y.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..variants import Variant

SPAN = 4096  # columns of x per program: few rows still make many programs
BLOCK_OUT = 256


@dataclass(frozen=True)
class Config:
    """block_t tokens by block_d columns a step, for ranks up to `rank`; up to 4 without tl.dot, which takes 16."""

    rank: int
    block_t: int
    block_d: int
    num_warps: int
    num_stages: int


# few tokens a tile, all of one row: the rows of an evaluation are short
CONFIGS = (
    Config(1, 16, 256, 4, 4),
    Config(2, 16, 128, 4, 4),
    Config(4, 16, 64, 4, 4),
    Config(16, 16, 128, 4, 4),
    Config(32, 16, 128, 4, 4),
    Config(64, 16, 64, 4, 4),
)
# without alignment to 16 elements loads are element by element, and wide tiles spill registers
RAGGED = tuple(replace(config, block_d=config.block_d // 2) for config in CONFIGS)
BLOCK_T = 16  # of expand


@triton.jit(do_not_specialize=["tokens", "blocks", "groups", "rank"])
def shrink_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, tokens, d_in], last dimension contiguous
    right_ptr,  # [groups, rank, d_in], last dimension contiguous
    group_ptr,  # [rows] int64
    s_ptr,  # [splits, rows, tokens, rank] fp32, contiguous: what each span of columns adds
    tokens,
    d_in,
    rank,
    groups,
    blocks,  # of tokens in a row
    x_row,
    x_token,
    right_group,
    right_rank,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.load(group_ptr + row)
    if group < 0:
        return
    group = tl.minimum(group, groups - 1)  # expand makes a NaN of what is too high
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, RANK)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, d_in)
    x_ptr += row * x_row
    right_ptr += group * right_group
    s_tile = s_ptr + (tl.program_id(1) * (tl.num_programs(0) // blocks) + row) * tokens * rank
    s_tile += t.to(tl.int64)[:, None] * rank + r[None, :]
    inside = (t[:, None] < tokens) & (r[None, :] < rank)
    if RANK <= 4:
        # summed over columns once, behind the loop
        sums = tl.zeros((BLOCK_T, RANK, BLOCK_D), dtype=tl.float32)
        x_tile = x_ptr + t.to(tl.int64)[:, None, None] * x_token
        right_tile = right_ptr + r.to(tl.int64)[None, :, None] * right_rank
        for start in tl.range(first, last, BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D)[None, None, :]
            x = tl.load(x_tile + d, mask=(t[:, None, None] < tokens) & (d < last), other=0.0)
            right = tl.load(right_tile + d, mask=(r[None, :, None] < rank) & (d < last), other=0.0)
            sums += x.to(tl.float32) * right.to(tl.float32)
        tl.store(s_tile, tl.sum(sums, axis=2), mask=inside)
    else:
        acc = tl.zeros((BLOCK_T, RANK), dtype=tl.float32)
        x_tile = x_ptr + t.to(tl.int64)[:, None] * x_token
        right_tile = right_ptr + r.to(tl.int64)[None, :] * right_rank
        for start in tl.range(first, last, BLOCK_D, num_stages=STAGES):
            d = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_tile + d[None, :], mask=(t[:, None] < tokens) & (d[None, :] < last), other=0.0)
            right = tl.load(right_tile + d[:, None], mask=(r[None, :] < rank) & (d[:, None] < last), other=0.0)
            if x.dtype == right.dtype:
                acc = tl.dot(x, right, acc, input_precision="ieee")
            elif x.dtype == tl.bfloat16:
                # fp32 factors as the sum of two bf16 numbers (2^-17 of them is lost), each product exact in fp32
                high = right.to(tl.bfloat16)
                acc = tl.dot(x, high, acc)
                acc = tl.dot(x, (right - high.to(tl.float32)).to(tl.bfloat16), acc)
            else:  # fp16 has not the range for that
                acc = tl.dot(x.to(tl.float32), right, acc, input_precision="ieee")
        tl.store(s_tile, acc, mask=inside)


@triton.jit(do_not_specialize=["tokens", "blocks", "groups", "rank", "splits"])
def expand_kernel(  # type: ignore[no-untyped-def]
    y_ptr,  # [rows, tokens, d_out], last dimension contiguous
    left_ptr,  # [groups, d_out, rank], any strides
    group_ptr,  # [rows] int64
    s_ptr,  # [splits, rows, tokens, rank] fp32, contiguous
    tokens,
    d_out,
    rank,
    groups,
    blocks,
    splits,
    y_row,
    y_token,
    left_group,
    left_out,
    left_rank,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.load(group_ptr + row)
    if group < 0:
        return
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = (t[:, None] < tokens) & (n[None, :] < d_out)
    y_tile = y_ptr + row * y_row + t.to(tl.int64)[:, None] * y_token + n[None, :]
    y = tl.load(y_tile, mask=inside, other=0.0)
    # nobody could be told of a group that is not there without waiting for the device: its rows become NaN
    acc = tl.where(group < groups, 0.0, float("nan")) + tl.zeros((BLOCK_T, BLOCK_OUT), dtype=tl.float32)
    left_col = left_ptr + tl.minimum(group, groups - 1) * left_group + n.to(tl.int64) * left_out
    s_row = s_ptr + (row * tokens + t.to(tl.int64)) * rank
    split_step = (tl.num_programs(0) // blocks).to(tl.int64) * tokens * rank
    for _ in range(rank):  # outer products: as many multiply-adds as tl.dot in fp32, for any rank
        left = tl.load(left_col, mask=n < d_out, other=0.0).to(tl.float32)
        s = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for split in range(splits):
            s += tl.load(s_row + split * split_step, mask=t < tokens, other=0.0)
        acc += s[:, None] * left[None, :]
        left_col += left_rank
        s_row += 1
    tl.store(y_tile, (y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=inside)


def partial_sums(x: Tensor, right: Tensor) -> Tensor:
    """Memory for what :func:`shrink` gives: [splits, rows, T, r] fp32."""
    rows, tokens, width = x.shape
    return x.new_empty(triton.cdiv(width, SPAN), rows, tokens, right.shape[1], dtype=torch.float32)


def shrink(s: Tensor, x: Tensor, right: Tensor, group: Tensor, config: Config | None = None) -> None:
    """s[:, i] = x[i] right[group[i]]ᵀ by spans of columns; nothing is written for rows without a delta.

    ``x: [rows, T, d_in]`` and ``right: [G, r, d_in]``, last dimensions contiguous, nothing empty, r <= 64.
    """
    splits, rows, tokens, rank = s.shape
    sizes = (x.shape[2], x.stride(0), x.stride(1), right.stride(0), right.stride(1), x.data_ptr(), right.data_ptr())
    configs = CONFIGS if all(size % 16 == 0 for size in sizes) else RAGGED
    config = config or next(each for each in configs if each.rank >= rank)
    blocks = triton.cdiv(tokens, config.block_t)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors say; no-op on the CPU
        shrink_kernel[(rows * blocks, splits)](
            x,
            right,
            group,
            s,
            tokens,
            x.shape[2],
            rank,
            len(right),
            blocks,
            x.stride(0),
            x.stride(1),
            right.stride(0),
            right.stride(1),
            RANK=config.rank,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            SPAN=SPAN,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
        )


def expand_(y: Tensor, s: Tensor, left: Tensor, group: Tensor) -> None:
    """y[i] += (sum of s[:, i]) left[group[i]]ᵀ: ``y: [rows, T, d_out]``, last dimension contiguous, nothing empty."""
    splits, rows, tokens, rank = s.shape
    blocks = triton.cdiv(tokens, BLOCK_T)
    with torch.cuda.device_of(y):
        expand_kernel[(rows * blocks, triton.cdiv(y.shape[2], BLOCK_OUT))](
            y,
            left,
            group,
            s,
            tokens,
            y.shape[2],
            rank,
            len(left),
            blocks,
            splits,
            y.stride(0),
            y.stride(1),
            left.stride(0),
            left.stride(1),
            left.stride(2),
            BLOCK_T=BLOCK_T,
            BLOCK_OUT=BLOCK_OUT,
            num_warps=4,
        )


def variants() -> list[Variant]:
    """What gate B compiles: every rank's shrink and the one expand, aligned and not, factors as x and in fp32."""
    found = []
    for dtype, factors in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")):
        default = (dtype, factors) == ("bf16", "fp32")  # what a session runs on a GPU
        types = {"group_ptr": "*i64", "s_ptr": "*fp32"}
        for aligned in (True, False):
            name = f"{dtype}-{factors}-{'aligned' if aligned else 'ragged'}"
            for config in CONFIGS if aligned else RAGGED:
                found.append(
                    Variant(
                        name=f"delta-shrink-r{config.rank}-{name}",
                        kernel=shrink_kernel,
                        types=types | {"x_ptr": f"*{dtype}", "right_ptr": f"*{factors}"},
                        constants={
                            "RANK": config.rank,
                            "BLOCK_T": config.block_t,
                            "BLOCK_D": config.block_d,
                            "SPAN": SPAN,
                            "STAGES": config.num_stages,
                        },
                        aligned=("x_ptr", "right_ptr", "group_ptr", "s_ptr")
                        + (("d_in", "x_row", "x_token", "right_group", "right_rank") if aligned else ()),
                        num_warps=config.num_warps,
                        pipelined=aligned,
                        default=default,
                    )
                )
            found.append(
                Variant(
                    name=f"delta-expand-{name}",
                    kernel=expand_kernel,
                    types=types | {"y_ptr": f"*{dtype}", "left_ptr": f"*{factors}"},
                    constants={"left_out": 1, "BLOCK_T": BLOCK_T, "BLOCK_OUT": BLOCK_OUT},
                    aligned=("y_ptr", "left_ptr", "group_ptr", "s_ptr")
                    + (("d_out", "y_row", "y_token", "left_group", "left_rank") if aligned else ()),
                    default=default,
                )
            )
    return found
