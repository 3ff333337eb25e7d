"""Add a low-rank update to a stored weight and write it back in the weight's own format: bf16, fp16, 4 or 8 bits."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import TORCH, TRITON, WIDE, Implementation, Operation
from ..errors import InputError
from .common import check_factors, full_precision, name, row_blocks, share, square
from .quantized import (
    FourBit,
    Nested,
    operation_4bit,
    operation_int8,
    requantize_add_4bit,
    requantize_add_bitsandbytes_,
    requantize_add_int8,
)
from .reference import share_lost, stochastic

__all__ = [
    "FourBit",
    "Nested",
    "Written",
    "full_precision",
    "operation",
    "operation_4bit",
    "operation_int8",
    "requantize_add",
    "requantize_add_4bit",
    "requantize_add_bitsandbytes_",
    "requantize_add_int8",
    "share_lost",
]

ROUNDINGS = ("nearest", "stochastic")


class Written(NamedTuple):
    """weight: [d_out, d_in] as W, new memory in W's layout; lost: share of the update that rounding lost
    total: [d_out, d_in] fp32, what was rounded; None where it was not kept, `weight` itself where W is fp32
    """

    weight: Tensor
    total: Tensor | None
    lost: float


@torch.no_grad()
def requantize_add(
    W: Tensor,
    left: Tensor,
    right: Tensor | None,
    base: Tensor | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    keep_total: bool = False,
    impl: str = "auto",
) -> Written:
    """round(W + left @ right), or round(base + left @ right), in W's dtype; nothing given is changed.

    W: [d_out, d_in] bf16, fp16, fp32 or fp64, the weight as it is, any strides (the transposed view of a Conv1D's
        weight); what is said of fp32 sums below is fp64 then
    left: [d_out, r] fp32; right: [r, d_in] fp32; or left: [d_out, d_in], the update itself, and right None
    base: [d_out, d_in] fp32, the running sum of which W is the rounding: small updates add up before they are rounded
    rounding: "nearest", ties to even; "stochastic": to one of the two neighbours, the farther one with the share of the
        way that the sum is towards it, so that its mean is the sum (what is past the largest number goes to the
        nearest). An fp32 weight has nothing to round.
    seed: of stochastic rounding, 0 <= seed < 2^63; the same seed rounds the same. An element's random number depends on
        its row, column and d_in alone; the two implementations draw different ones.
    keep_total: return the fp32 sum too

    The product, the sum and the difference are fp32 (never tf32) whatever torch's settings, the norms fp64 over fp32
    sums of a tile or row. The kernel never has ``left @ right`` in memory, torch has a block of rows at a time.
    lost = ‖(new - W) - left @ right‖ / ‖left @ right‖.

    Raises InputError: a dtype, shape, device, rounding or seed is not as above, or ``impl`` cannot serve it.
    """
    if W.ndim != 2 or W.dtype not in WIDE:
        raise InputError(f"requantize_add: W is {name(W)}; expected [d_out, d_in] in float16 to float64 or bfloat16")
    wide = torch.promote_types(W.dtype, torch.float32)  # of the sum
    check_factors("requantize_add", W.shape, left, right, W.device)
    if base is not None and (base.shape != W.shape or base.dtype is not wide or base.device != W.device):
        expected = f"{list(W.shape)} {str(wide).removeprefix('torch.')} on {W.device}"
        raise InputError(f"requantize_add: base is {name(base)} on {base.device}; expected {expected}")
    if rounding not in ROUNDINGS:
        raise InputError(f"requantize_add: rounding={rounding!r} is not one of {', '.join(ROUNDINGS)}")
    if not 0 <= seed < 2**63:
        raise InputError(f"requantize_add: seed is {seed}; expected 0 <= seed < 2^63")
    if not W.numel():
        weight = W.clone()
        return Written(weight, weight.to(wide) if keep_total else None, 0.0)
    # bf16 travels as its bits: the interpreter has no bf16
    bits = W.view(torch.int16) if W.dtype is torch.bfloat16 else W
    chance = seed if rounding == "stochastic" and W.dtype is not wide else None
    keep = keep_total and W.dtype is not wide  # an fp32 weight is its own total
    new, total, sums = operation(bits, base, left, right, chance, keep, impl=impl)
    weight = new.view(W.dtype)
    return Written(weight, weight if keep_total and not keep else total, share(sums))


def _torch(
    W: Tensor, base: Tensor | None, left: Tensor, right: Tensor | None, seed: int | None, keep_total: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    W = W.view(torch.bfloat16) if W.dtype is torch.int16 else W
    wide = torch.promote_types(W.dtype, torch.float32)
    new = torch.empty_like(W)
    total = torch.empty_like(W, dtype=torch.float32) if keep_total else None
    chance = None if seed is None else torch.Generator(W.device).manual_seed(seed)
    sums = []
    for rows in row_blocks(W.shape):
        with full_precision():
            change = left[rows] if right is None else left[rows] @ right
        old = W[rows].to(wide)
        place = new[rows] if W.dtype is wide else None if total is None else total[rows]
        summed = torch.add(old if base is None else base[rows], change, out=place)
        if chance is not None:
            uniform = torch.rand(summed.shape, generator=chance, device=W.device)
            new[rows] = stochastic(summed, W.dtype, uniform)
        elif W.dtype is not wide:
            new[rows] = summed
        sums.append(torch.stack([square((new[rows] - old).sub_(change)), square(change)]))
    return new.view(torch.int16) if W.dtype is torch.bfloat16 else new, total, torch.stack(sums)


def _triton(
    W: Tensor, base: Tensor | None, left: Tensor, right: Tensor | None, seed: int | None, keep_total: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    from . import kernel

    return kernel.requantize_add(W, base, left, right, seed, keep_total)


operation = Operation(
    "requantize_add",
    triton=Implementation(_triton, TRITON),
    torch=Implementation(_torch, TORCH),
)
