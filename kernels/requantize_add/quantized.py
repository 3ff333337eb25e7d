"""The layouts of bitsandbytes: NF4 and FP4 blocks, LLM.int8() rows. Dequantise, add, requantise, in one pass."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import TORCH, TRITON, Implementation, Operation
from ..errors import InputError
from . import reference
from .common import check_factors, full_precision, name, row_blocks, share, square
from .reference import CODES, share_lost


@dataclass(frozen=True)
class Nested:
    """Statistics that are themselves quantised: absmax = code[q] * absmax of its block + offset.

    absmax: [blocks] fp32, of blocks of `blocksize` statistics; code: [256] fp32, ascending; offset: [] fp32
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int = 256


@dataclass(frozen=True)
class FourBit:
    """A weight in blocks of 4-bit codes, counted row by row: a block may go on in the next row.

    packed: d_out d_in / 2 uint8, the first of two codes in the high bits; any shape, contiguous
    absmax: [blocks] fp32, or uint8 where `nested` says what they mean
    shape: (d_out, d_in); quant_type: "nf4" or "fp4"; blocksize: a power of two from 32
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: Nested | None = None

    def statistics(self) -> Tensor:
        """[blocks] fp32: each block's absmax as it is read."""
        return self.absmax if self.nested is None else unnest(self.absmax, self.nested)

    def dequantize(self) -> Tensor:
        """[d_out, d_in] fp32."""
        codes = reference.code_bounds(self.quant_type, self.packed.device)[0]
        return reference.dequantize_4bit(self.packed.reshape(-1), self.statistics(), codes, self.blocksize).view(
            self.shape
        )


@torch.no_grad()
def requantize_add_4bit(
    weight: FourBit, left: Tensor, right: Tensor | None, impl: str = "auto"
) -> tuple[FourBit, float]:
    """The 4-bit weight nearest to ``weight + left @ right`` with each block's absmax measured anew, and the share lost.

    left: [d_out, r] fp32; right: [r, d_in] fp32; or left: [d_out, d_in] and right None

    Nothing given is changed. Codes are the nearest to value / absmax, the lower one on a tie, as bitsandbytes chooses;
    FP4's second zero is never written. Nested statistics are quantised after the pass, for they need the mean of all:
    codes are chosen by the exact absmax, `lost` counts what the quantised one does. All of it fp32, norms fp64;
    lost = ‖(new - old) - left @ right‖ / ‖left @ right‖ with both weights as they are read.

    Raises InputError: the layout is none of those, the factors do not fit it, or ``impl`` cannot serve these arguments
    (the kernel: rows that are not whole blocks, blocks above 256).
    """
    _check_4bit(weight)
    check_factors("requantize_add_4bit", weight.shape, left, right, weight.packed.device)
    if not weight.packed.numel():
        return weight, 0.0
    old = weight.statistics()
    packed, absmax, moments = operation_4bit(
        weight.packed.reshape(-1), old, left, right, weight.quant_type, weight.blocksize, impl=impl
    )
    stored, nested, off = absmax, None, torch.zeros_like(absmax)
    if weight.nested is not None:
        stored, nested = nest(absmax, weight.nested)
        off = unnest(stored, nested) - absmax
    error, mixed, squares, asked = moments.double().unbind(1)
    missed = (error + 2 * off.double() * mixed + off.double().square() * squares).sum().clamp_min(0)
    lost = share_lost(float(missed.sqrt()), float(asked.sum().sqrt()))
    return replace(weight, packed=packed.view(weight.packed.shape), absmax=stored, nested=nested), lost


@torch.no_grad()
def requantize_add_int8(
    codes: Tensor, scales: Tensor, left: Tensor, right: Tensor | None, impl: str = "auto"
) -> tuple[Tensor, Tensor, float]:
    """New codes and scales of the weight ``codes * scales / 127`` plus ``left @ right``, and the share lost.

    codes: [d_out, d_in] int8 (bitsandbytes' CB), rows at any stride; scales: [d_out] fp32, each row's absmax (SCB)
    left: [d_out, r] fp32; right: [r, d_in] fp32; or left: [d_out, d_in] and right None

    Nothing given is changed. Each row's absmax is measured anew; codes go to nearest, ties to even. All of it fp32;
    lost as in requantize_add_4bit.

    Raises InputError: a shape or dtype is not as above, or ``impl`` cannot serve these arguments.
    """
    if codes.ndim != 2 or codes.dtype is not torch.int8:
        raise InputError(f"requantize_add_int8: codes is {name(codes)}; expected [d_out, d_in] int8")
    if scales.shape != codes.shape[:1] or scales.dtype is not torch.float32 or scales.device != codes.device:
        expected = f"[{codes.shape[0]}] float32 on {codes.device}"
        raise InputError(f"requantize_add_int8: scales is {name(scales)} on {scales.device}; expected {expected}")
    check_factors("requantize_add_int8", codes.shape, left, right, codes.device)
    if not codes.numel():
        return codes.clone(), scales.clone(), 0.0
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    new, new_scales, sums = operation_int8(codes, scales.contiguous(), left, right, impl=impl)
    return new, new_scales, share(sums)


def requantize_add_bitsandbytes_(module: nn.Module, left: Tensor, right: Tensor | None, impl: str = "auto") -> float:
    """Add ``left @ right`` to the weight of a bitsandbytes Linear4bit or Linear8bitLt in place; returns the share lost.

    left: [d_out, r] fp32; right: [r, d_in] fp32; or left: [d_out, d_in] and right None; on the weight's device

    The module rather than its parameter, for the first forward of Linear8bitLt moves the weight's statistics there.
    Everything is computed before anything is assigned: after an error the module is as it was.

    Raises InputError: the weight is not quantised or its layout is not understood (4 bits repacked for a CPU by a
    forward, another code), the update does not fit or is not finite.
    """
    if not all(bool(torch.isfinite(each).all()) for each in (left, right) if each is not None):
        raise InputError("requantize_add_bitsandbytes_: the update holds NaN or infinity; the weight was not changed")
    weight: Any = module.weight
    if hasattr(weight, "quant_state"):
        return _add_4bit_(weight, left, right, impl)
    if hasattr(weight, "SCB"):
        return _add_int8_(module, left, right, impl)
    found = f"{type(module).__name__} with a {type(weight).__name__}"
    raise InputError(
        f"requantize_add_bitsandbytes_: module is {found}; expected bitsandbytes' Linear4bit, Linear8bitLt"
    )


def _add_4bit_(weight: Any, left: Tensor, right: Tensor | None, impl: str) -> float:
    state = weight.quant_state
    if state is None:
        raise InputError(
            "requantize_add_bitsandbytes_: the 4-bit weight is not quantised yet; move it to a device first"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise InputError(
            "requantize_add_bitsandbytes_: a forward on the CPU repacked the 4-bit weight; "
            "expected bitsandbytes' own order (add before the first forward, or on a GPU)"
        )
    expected = torch.tensor(CODES.get(state.quant_type, ()), device=state.code.device)
    if state.code.shape != expected.shape or not torch.allclose(state.code.float(), expected, atol=1e-6):
        raise InputError(f"requantize_add_bitsandbytes_: code {state.quant_type!r} is not bitsandbytes' NF4 or FP4")
    inner = state.state2 if state.nested else None
    nested = None if inner is None else Nested(inner.absmax, inner.code, state.offset, inner.blocksize)
    storage = weight.data
    before = FourBit(
        storage.reshape(-1).view(torch.uint8),  # quant_storage may be any dtype
        state.absmax,
        tuple(state.shape),
        state.quant_type,
        state.blocksize,
        nested,
    )
    after, lost = requantize_add_4bit(before, left, right, impl)
    data = after.packed.view(storage.dtype).view(storage.shape)
    weight.data, state.absmax = data, after.absmax
    if after.nested is not None:
        state.state2.absmax, state.offset = after.nested.absmax, after.nested.offset
    return lost


def _add_int8_(module: Any, left: Tensor, right: Tensor | None, impl: str) -> float:
    weight = module.weight
    holder = weight if weight.SCB is not None else getattr(module, "state", weight)
    if weight.dtype is not torch.int8 or holder.SCB is None:
        raise InputError(
            f"requantize_add_bitsandbytes_: the weight is {name(weight.data)}; expected int8 rows with their SCB "
            "(has_fp16_weights=False, moved to a device)"
        )
    codes, scales, lost = requantize_add_int8(weight.data, holder.SCB, left, right, impl)
    weight.data, holder.CB, holder.SCB = codes, codes, scales
    return lost


def _check_4bit(weight: FourBit) -> None:
    def refuse(what: str) -> InputError:
        return InputError(f"requantize_add_4bit: {what}")

    d_out, d_in = weight.shape if len(weight.shape) == 2 else (0, 0)
    size, nested = weight.blocksize, weight.nested
    if len(weight.shape) != 2 or d_out * d_in % 2:
        raise refuse(f"shape is {list(weight.shape)}; expected [d_out, d_in] with an even number of elements")
    if weight.quant_type not in CODES:
        raise refuse(f"quant_type={weight.quant_type!r} is not one of {', '.join(CODES)}")
    if size < 32 or size & (size - 1):
        raise refuse(f"blocksize is {size}; expected a power of two from 32")
    if weight.packed.dtype is not torch.uint8 or 2 * weight.packed.numel() != d_out * d_in:
        raise refuse(f"packed is {name(weight.packed)}; expected {d_out * d_in // 2} uint8 for shape {[d_out, d_in]}")
    blocks = -(-d_out * d_in // size)
    dtype = torch.float32 if nested is None else torch.uint8
    if weight.absmax.shape != (blocks,) or weight.absmax.dtype is not dtype:
        kind = "float32" if nested is None else "uint8 with nested statistics"
        raise refuse(f"absmax is {name(weight.absmax)}; expected [{blocks}] {kind}")
    if nested is not None:
        parts = {"absmax": nested.absmax, "code": nested.code, "offset": nested.offset}
        shapes = {"absmax": (-(-blocks // nested.blocksize),), "code": (256,), "offset": ()}
        for part, tensor in parts.items():
            if tensor.shape != shapes[part] or tensor.dtype is not torch.float32:
                raise refuse(f"nested {part} is {name(tensor)}; expected {list(shapes[part])} float32")
        if not bool((nested.code.diff() >= 0).all()):
            raise refuse("nested code is not ascending")


def unnest(absmax: Tensor, nested: Nested) -> Tensor:
    """[blocks] uint8 -> fp32."""
    values = reference.in_blocks(nested.code[absmax.long()], nested.blocksize) * nested.absmax[:, None]
    return values.view(-1)[: len(absmax)] + nested.offset


def nest(absmax: Tensor, like: Nested) -> tuple[Tensor, Nested]:
    """[blocks] fp32 -> uint8 and what they mean, by like's code and blocks, around a new mean."""
    offset = absmax.mean()
    bounds = (like.code[1:] + like.code[:-1]) / 2
    codes, largest = reference.quantize_blocks(absmax - offset, bounds, like.blocksize)
    return codes.to(torch.uint8), replace(like, absmax=largest, offset=offset)


def _torch_4bit(
    packed: Tensor, absmax: Tensor, left: Tensor, right: Tensor | None, quant_type: str, blocksize: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes = reference.code_bounds(quant_type, packed.device)[0]
    d_in = (left if right is None else right).shape[1]
    parts = []
    for rows in row_blocks((len(left), d_in), multiple=blocksize):  # so that a part is whole blocks
        with full_precision():
            change = (left[rows] if right is None else left[rows] @ right).reshape(-1)
        start = rows.start * d_in
        old_packed = packed[start // 2 : (start + len(change)) // 2]
        old_absmax = absmax[start // blocksize : -(-(start + len(change)) // blocksize)]
        new_packed, new_absmax = reference.requantize_add_4bit(old_packed, old_absmax, change, quant_type, blocksize)
        values = reference.dequantize_4bit(old_packed, old_absmax, codes, blocksize) + change
        error = reference.dequantize_4bit(new_packed, new_absmax, codes, blocksize) - values
        new, error, change = (
            reference.in_blocks(each, blocksize) for each in (codes[reference.unpack(new_packed)], error, change)
        )
        moments = [(error * error).sum(1), (new * error).sum(1), (new * new).sum(1), (change * change).sum(1)]
        parts.append((new_packed, new_absmax, torch.stack(moments, 1)))
    first, second, third = (torch.cat(each) for each in zip(*parts, strict=True))
    return first, second, third


def _torch_int8(codes: Tensor, scales: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    new, new_scales, sums = torch.empty_like(codes), torch.empty_like(scales), []
    for rows in row_blocks(codes.shape):
        with full_precision():
            change = left[rows] if right is None else left[rows] @ right
        new[rows], new_scales[rows] = reference.requantize_add_int8(codes[rows], scales[rows], change)
        old = reference.dequantize_int8(codes[rows], scales[rows])
        missed = (reference.dequantize_int8(new[rows], new_scales[rows]) - old).sub_(change)
        sums.append(torch.stack([square(missed), square(change)]))
    return new, new_scales, torch.stack(sums)


def _triton_4bit(
    packed: Tensor, absmax: Tensor, left: Tensor, right: Tensor | None, quant_type: str, blocksize: int
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.requantize_add_4bit(packed, absmax.contiguous(), left, right, quant_type, blocksize)


def _triton_int8(codes: Tensor, scales: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel

    return kernel.requantize_add_int8(codes, scales, left, right)


def _sizes(
    packed: Tensor, absmax: Tensor, left: Tensor, right: Tensor | None, quant_type: str, blocksize: int
) -> Mapping[str, int]:
    d_in = (left if right is None else right).shape[1]
    return {"blocksize": blocksize, "the part of a row past its last whole block": d_in % blocksize}


_ALIGNED = replace(TRITON, sizes={"blocksize": (32, 256), "the part of a row past its last whole block": (0, 0)})
operation_4bit = Operation(
    "requantize_add_4bit",
    sizes=_sizes,
    triton=Implementation(_triton_4bit, _ALIGNED),
    torch=Implementation(_torch_4bit, TORCH),
)
operation_int8 = Operation(
    "requantize_add_int8",
    triton=Implementation(_triton_int8, TRITON),
    torch=Implementation(_torch_int8, TORCH),
)
