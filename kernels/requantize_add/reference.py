"""The specification of writing an update into a stored weight: obvious torch, in whatever dtype the update has.

Everything is computed in the dtype of `change`: float32 is what is run, float64 what it is measured against.
"""

import torch
from torch import Tensor

# bitsandbytes' codes, by their bits: the quantiles of NormalFloat4, and 1 sign, 2 exponent, 1 mantissa bit over 12
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * magnitude / 12 for sign in (1, -1) for magnitude in _FP4)
CODES = {"nf4": NF4, "fp4": FP4}
STEP = 1 / 127  # of LLM.int8() rows


def share_lost(missed: float, asked: float) -> float:
    """What of an update did not arrive: ‖(W_new - W_old) - update‖ over ‖update‖; 0 where none was asked."""
    return missed / asked if asked else 0.0


def stochastic(values: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Each value to one of its two neighbours in `dtype` (16 bit), to the farther from zero with the share it is past
    the other; `uniform`: [0, 1) for each. Where the farther one would be infinite, to the nearest.
    """
    nearest = values.to(dtype)
    bits = nearest.view(torch.int16)
    low = bits - (nearest.abs() > values.abs()).to(torch.int16)  # sign and magnitude: one bit less is nearer to zero
    high = low + 1
    below, above = (each.view(dtype).to(values.dtype).abs() for each in (low, high))
    up = uniform * (above - below) < values.abs() - below
    return torch.where(torch.isfinite(above), torch.where(up, high, low), bits).view(dtype)


def code_bounds(quant_type: str, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """codes: [16] fp32 by their bits; bounds: [15] fp32 between the sorted ones; order: [16] int32, sorted -> bits."""
    codes = torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)
    ordered, order = codes.sort(stable=True)
    order = torch.where(ordered == 0, codes.eq(0).int().argmax(), order)  # the second zero of FP4 is read, not written
    return codes, (ordered[1:] + ordered[:-1]) / 2, order.int()


def unpack(packed: Tensor) -> Tensor:
    """[n] uint8, two codes each, the first in the high bits -> [2 n] int64."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1).long()


def pack(codes: Tensor) -> Tensor:
    """[2 n] -> [n] uint8."""
    high, low = codes.to(torch.uint8).view(-1, 2).unbind(1)
    return high << 4 | low


def absmax_scale(largest: Tensor) -> Tensor:
    return 1 / largest.clamp_min(1.2e-38)  # a normal number


def quantize_blocks(values: Tensor, bounds: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """[n] -> which of the sorted codes each is nearest to, times its block's absmax, [n]; absmax [blocks].

    bounds: between the sorted codes; on one, the lower code is taken.
    """
    blocks = in_blocks(values, blocksize)
    largest = blocks.abs().amax(1)
    scaled = blocks * absmax_scale(largest)[:, None]
    return torch.bucketize(scaled, bounds.to(values.dtype)).view(-1)[: len(values)], largest


def in_blocks(values: Tensor, blocksize: int) -> Tensor:
    """[n] -> [blocks, blocksize], the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -len(values) % blocksize)).view(-1, blocksize)


def dequantize_4bit(packed: Tensor, absmax: Tensor, codes: Tensor, blocksize: int) -> Tensor:
    """[n / 2] uint8, [blocks] -> [n] in absmax's dtype."""
    values = in_blocks(codes.to(absmax.dtype)[unpack(packed)], blocksize) * absmax[:, None]
    return values.view(-1)[: 2 * len(packed)]


def requantize_add_4bit(
    packed: Tensor, absmax: Tensor, change: Tensor, quant_type: str, blocksize: int
) -> tuple[Tensor, Tensor]:
    """New packed codes [n / 2] and absmax [blocks] of the weight plus `change` [n]."""
    codes, bounds, order = code_bounds(quant_type, change.device)
    values = dequantize_4bit(packed, absmax.to(change.dtype), codes, blocksize) + change
    nearest, largest = quantize_blocks(values, bounds, blocksize)
    return pack(order[nearest]), largest


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """[rows, d] int8, [rows] absmax of each row -> [rows, d] in scales' dtype."""
    return codes.to(scales.dtype) * scales[:, None] * STEP


def requantize_add_int8(codes: Tensor, scales: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """New codes [rows, d] int8 and scales [rows] of the weight plus `change` [rows, d]; ties go to the even code."""
    values = dequantize_int8(codes, scales.to(change.dtype)) + change
    largest = values.abs().amax(1) if values.shape[1] else scales.to(change.dtype)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return (values * inverse[:, None]).round().to(torch.int8), largest
