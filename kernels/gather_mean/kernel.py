"""Triton: sums of rows' vectors at one token each, and the twin that adds a vector there. No atomics."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import pick
from ..variants import Variant


@dataclass(frozen=True)
class Config:
    """block elements of each of `lines` tokens a program; the gather takes one token at a time."""

    block: int
    num_warps: int
    lines: int = 1


# The first is launched, the others wait for a GPU to tune on. Both kernels only move memory.
GATHER = (Config(512, 4), Config(1024, 4), Config(2048, 8))
SCATTER = (Config(512, 4, lines=4), Config(256, 4, lines=8), Config(1024, 4))


@triton.jit(do_not_specialize=["tokens"])
def gather_mean_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, tokens, width], last dimension contiguous
    k_ptr,  # [n, width] fp32, last dimension contiguous
    order_ptr,  # [rows] i64, the rows sorted by group
    end_ptr,  # [rows] i64, in that order: where each one's group ends
    group_ptr,  # [rows] i64, like the two below by row number
    position_ptr,  # [rows] i64
    weight_ptr,  # [rows] fp32, or None
    n,
    tokens,
    width,
    x_row,
    x_token,
    k_row,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)
    end = tl.load(end_ptr + first)
    before = tl.load(end_ptr + first - 1, mask=first > 0, other=0)
    row = tl.load(order_ptr + first)
    group = tl.load(group_ptr + row)
    # the program of a group's first row adds all of them, in order
    if (end != before) & (group >= 0) & (group < n):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        # int64: rows * tokens * width and n * width both pass 2^31
        k_line = k_ptr + group * k_row + column
        acc = tl.load(k_line, mask=inside)
        for line in range(first, end):
            row = tl.load(order_ptr + line)
            position = tl.load(position_ptr + row)
            there = (position >= 0) & (position < tokens)
            x = tl.load(x_ptr + row * x_row + position * x_token + column, mask=inside & there, other=float("nan"))
            x = x.to(tl.float32)
            if weight_ptr is not None:
                x *= tl.load(weight_ptr + row)
            acc += x
        tl.store(k_line, acc, mask=inside)


@triton.jit(do_not_specialize=["lines", "tokens"])
def scatter_add_kernel(  # type: ignore[no-untyped-def]
    h_ptr,  # [rows, tokens, width], last dimension contiguous
    out_ptr,  # [lines, width], contiguous
    position_ptr,  # [rows] i64
    group_ptr,  # [rows] i64
    delta_ptr,  # [n, width] fp32, last dimension contiguous
    lines,  # rows * tokens
    n,
    tokens,
    width,
    h_row,
    h_token,
    delta_row,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: rows * tokens * width passes 2^31
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    live = line < lines
    row = line // tokens
    token = line - row * tokens
    changed = live & (tl.load(position_ptr + row, mask=live, other=-1) == token)
    group = tl.load(group_ptr + row, mask=changed, other=0)
    known = changed & (group >= 0) & (group < n)
    inside = live[:, None] & (column < width)
    h = tl.load(h_ptr + (row * h_row + token * h_token)[:, None] + column, mask=inside, other=0.0)
    delta_line = delta_ptr + (group * delta_row)[:, None] + column
    delta = tl.load(delta_line, mask=inside & known[:, None], other=float("nan"))
    moved = (h.to(tl.float32) + delta).to(h.dtype)
    # chosen, not added as 0: the other tokens keep their bits
    tl.store(out_ptr + line[:, None] * width + column, tl.where(changed[:, None], moved, h), mask=inside)


def gather_mean_(
    K: Tensor, X: Tensor, position: Tensor, group: Tensor, weight: Tensor | None = None, config: Config | None = None
) -> None:
    """Launch on ``K: [n, d] fp32`` and ``X: [rows, T, d]``, last dimensions contiguous, X not empty.

    config: instead of the one that `tuned.pick` takes; no bit of the result depends on it
    """
    grouped, order = torch.sort(group, stable=True)
    end = torch.searchsorted(grouped, grouped, right=True)
    with torch.cuda.device_of(X):  # Triton launches on the current device, whatever the tensors say
        config = config or pick("gather_mean", _key(X), GATHER)
        gather_mean_kernel[(len(X), triton.cdiv(X.shape[2], config.block))](
            X,
            K,
            order,
            end,
            group,
            position,
            weight,
            len(K),
            X.shape[1],
            X.shape[2],
            X.stride(0),
            X.stride(1),
            K.stride(0),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )


def scatter_add(H: Tensor, position: Tensor, group: Tensor, delta: Tensor, config: Config | None = None) -> Tensor:
    """Launch on ``H: [rows, T, d]`` and ``delta: [n, d] fp32``, last dimensions contiguous, H not empty."""
    rows, tokens, width = H.shape
    out = torch.empty(H.shape, dtype=H.dtype, device=H.device)
    with torch.cuda.device_of(H):
        config = config or pick("scatter_add", _key(H), SCATTER)
        scatter_add_kernel[(triton.cdiv(rows * tokens, config.lines), triton.cdiv(width, config.block))](
            H,
            out,
            position,
            group,
            delta,
            rows * tokens,
            len(delta),
            tokens,
            width,
            H.stride(0),
            H.stride(1),
            delta.stride(0),
            LINES=config.lines,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return out


def _key(X: Tensor) -> str:
    return f"{8 * X.itemsize}bit-{triton.next_power_of_2(X.shape[2])}"


def variants() -> list[Variant]:
    """What gate B compiles: every configuration, on rows that are aligned to 16 elements and on others."""
    return [
        variant
        for dtype in ("bf16", "fp16", "fp32")
        for aligned in (True, False)
        for variant in (
            *(_gather_variant(dtype, config, aligned) for config in GATHER),
            *(_scatter_variant(dtype, config, aligned) for config in SCATTER),
        )
    ]


def _gather_variant(dtype: str, config: Config, aligned: bool) -> Variant:
    """Weighted where aligned: what both decide does not meet."""
    types = {"x_ptr": f"*{dtype}", "k_ptr": "*fp32"}
    types |= dict.fromkeys(("order_ptr", "end_ptr", "group_ptr", "position_ptr"), "*i64")
    weight: dict[str, Any] = {} if aligned else {"weight_ptr": None}
    types |= {} if weight else {"weight_ptr": "*fp32"}
    return Variant(
        name=f"gather_mean-{dtype}-{config.block}-w{config.num_warps}-{'aligned-weighted' if aligned else 'ragged'}",
        kernel=gather_mean_kernel,
        types=types,
        constants={"BLOCK": config.block, **weight},
        aligned=(*types, *(("width", "x_row", "x_token", "k_row") if aligned else ())),
        num_warps=config.num_warps,
        default=config is GATHER[0],
    )


def _scatter_variant(dtype: str, config: Config, aligned: bool) -> Variant:
    types = {"h_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "delta_ptr": "*fp32"}
    types |= dict.fromkeys(("position_ptr", "group_ptr"), "*i64")
    tile = f"{config.lines}x{config.block}-w{config.num_warps}"
    return Variant(
        name=f"scatter_add-{dtype}-{tile}-{'aligned' if aligned else 'ragged'}",
        kernel=scatter_add_kernel,
        types=types,
        constants={"LINES": config.lines, "BLOCK": config.block},
        aligned=(*types, *(("width", "h_row", "h_token", "delta_row") if aligned else ())),
        num_warps=config.num_warps,
        default=config is SCATTER[0],
    )
