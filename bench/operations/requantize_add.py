"""Adding a low-rank update to a stored weight: bf16, fp16, fp32, NF4 and FP4 blocks, LLM.int8() rows.

A code is a choice: near a tie two are as good. So quantised weights are compared as what they dequantise to with the
float64 sum before it was quantised: error of the operation and of plain torch are then both the quantisation's.
The share lost stands beside a 1, so that its error counts in absolute terms.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels import requantize_add as operations
from ...kernels.floors import Cost, requantize_add_4bit_cost, requantize_add_cost, requantize_add_int8_cost
from ...kernels.requantize_add import FourBit, Nested, reference
from ..check import Inputs, Outputs, Shape, Subject


def factors(shape: Shape, size: float, seed: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """An update whose elements are about `size`."""
    d_out, d_in, r = shape["d_out"], shape["d_in"], shape["r"]
    left, right = torch.randn(d_out, r, generator=seed), torch.randn(r, d_in, generator=seed)
    left *= size / max(r, 1) ** 0.5
    return (left @ right, None) if shape.get("dense") else (left, right)


def product(left: Tensor, right: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    return left.to(dtype) if right is None else left.to(dtype) @ right.to(dtype)


def lost(new: Tensor, old: Tensor, change: Tensor) -> Tensor:
    """[1, the share lost] in float64."""
    missed = (new.double() - old.double()) - change.double()
    return torch.tensor([1.0, reference.share_lost(float(missed.norm()), float(change.double().norm()))])


def beside_one(share: float) -> Tensor:
    return torch.tensor([1.0, share], dtype=torch.float64)


# dense


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    d_out, d_in = shape["d_out"], shape["d_in"]
    total = torch.randn(d_out, d_in, generator=seed) * 0.02
    W = total.to(dtype)
    left, right = factors(shape, 1e-4, seed)  # half a step of bf16 for the largest weights
    if shape.get("turned"):  # as Conv1D stores it
        W, total = (each.T.contiguous().T for each in (W, total))
    if shape.get("padded"):  # NaN lies between its rows
        wide = torch.full((d_out, d_in + 9), torch.nan, dtype=dtype)
        wide[:, 3:-6] = W
    base = total if shape.get("running") else None
    place = wide.to(device)[:, 3:-6] if shape.get("padded") else W.to(device)
    tensors = (place, *(None if each is None else each.to(device) for each in (left, right, base)))
    return *tensors, "stochastic" if shape.get("stochastic") else "nearest"


def outputs(written: operations.Written, rounding: str) -> Outputs:
    found = (written.weight,) if written.total is None else (written.weight, written.total)
    return found if rounding == "stochastic" else (*found, beside_one(written.lost))


def run(inputs: Inputs, impl: str) -> Outputs:
    W, left, right, base, rounding = inputs
    keep = base is not None
    written = operations.requantize_add(W, left, right, base, rounding, seed=7, keep_total=keep, impl=impl)
    return outputs(written, rounding)


def exact(inputs: Inputs) -> Outputs:
    """The sum itself: rounding is an error that the operation and plain torch both make."""
    W, left, right, base, rounding = inputs
    change = product(left, right, torch.float64)
    total = (W if base is None else base).double() + change
    found = (total,) if base is None else (total, total)
    return found if rounding == "stochastic" else (*found, lost(total.to(W.dtype), W, change))


def plain(inputs: Inputs) -> Outputs:
    W, left, right, base, rounding = inputs
    change = product(left, right)
    total = (W.float() if base is None else base) + change
    if rounding == "stochastic" and W.dtype is not torch.float32:
        uniform = torch.rand(total.shape, generator=torch.Generator().manual_seed(0)).to(total.device)
        weight = reference.stochastic(total, W.dtype, uniform)
    else:
        weight = total.to(W.dtype)
    found = (weight,) if base is None else (weight, total)
    return found if rounding == "stochastic" else (*found, lost(weight, W, change))


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    return requantize_add_cost(shape["d_out"], shape["d_in"], shape["r"], dtype.itemsize)


# 4 bits


def quantized(values: Tensor, quant_type: str, nested: bool, blocksize: int = 64) -> FourBit:
    """The nearest 4-bit weight, as bitsandbytes would store it."""
    blocks = -(-values.numel() // blocksize)
    packed = torch.zeros(values.numel() // 2, dtype=torch.uint8)
    packed, absmax = reference.requantize_add_4bit(
        packed, torch.zeros(blocks), values.reshape(-1), quant_type, blocksize
    )
    weight = FourBit(packed[:, None], absmax, (values.shape[0], values.shape[1]), quant_type, blocksize)
    if not nested:
        return weight
    offset, code = absmax.mean(), torch.linspace(-1, 1, 256) ** 3  # finer around the mean, as bitsandbytes' is
    codes, largest = reference.quantize_blocks(absmax - offset, (code[1:] + code[:-1]) / 2, 256)
    return FourBit(
        weight.packed, codes.to(torch.uint8), weight.shape, quant_type, blocksize, Nested(largest, code, offset)
    )


def moved(weight: FourBit, device: torch.device) -> FourBit:
    inner = weight.nested
    nested = inner and Nested(inner.absmax.to(device), inner.code.to(device), inner.offset.to(device), inner.blocksize)
    packed, absmax = weight.packed.to(device), weight.absmax.to(device)
    return FourBit(packed, absmax, weight.shape, weight.quant_type, weight.blocksize, nested)


def make_4bit(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    W = torch.randn(shape["d_out"], shape["d_in"], generator=seed) * 0.02
    left, right = factors(shape, 5e-3, seed)
    weight = quantized(W, "fp4" if shape.get("fp4") else "nf4", bool(shape.get("nested")), shape.get("blocksize", 64))
    return moved(weight, device), left.to(device), None if right is None else right.to(device)


def run_4bit(inputs: Inputs, impl: str) -> Outputs:
    weight, left, right = inputs
    weight, share = operations.requantize_add_4bit(weight, left, right, impl)
    return weight.dequantize(), weight.statistics(), beside_one(share)


def in_4bit(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, FourBit]:
    """The update, and the weight by the reference in `dtype`."""
    weight, left, right = inputs
    change = product(left, right, dtype)
    packed, absmax = reference.requantize_add_4bit(
        weight.packed.view(-1), weight.statistics(), change.view(-1), weight.quant_type, weight.blocksize
    )
    stored, nested = absmax.float(), None
    if weight.nested is not None:
        stored, nested = operations.quantized.nest(stored, weight.nested)
    return change, FourBit(packed, stored, weight.shape, weight.quant_type, weight.blocksize, nested)


def exact_4bit(inputs: Inputs) -> Outputs:
    change, after = in_4bit(inputs, torch.float64)
    old = inputs[0].dequantize()
    total = old.double() + change
    blocks = reference.in_blocks(total.view(-1), after.blocksize)
    return total, blocks.abs().amax(1), lost(after.dequantize(), old, change)


def plain_4bit(inputs: Inputs) -> Outputs:
    change, after = in_4bit(inputs, torch.float32)
    new = after.dequantize()
    return new, after.statistics(), lost(new, inputs[0].dequantize(), change)


def bitsandbytes_4bit(inputs: Inputs) -> Outputs:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight, left, right = inputs
    old = weight.dequantize()
    change = product(left, right)
    nested = weight.nested is not None
    stored = quantize_4bit(
        old + change, blocksize=weight.blocksize, compress_statistics=nested, quant_type=weight.quant_type
    )
    new = dequantize_4bit(*stored)
    blocks = reference.in_blocks((old + change).view(-1), weight.blocksize)
    return new, blocks.abs().amax(1), lost(new, old, change)


def cost_4bit(shape: Shape, dtype: torch.dtype) -> Cost:
    return requantize_add_4bit_cost(shape["d_out"], shape["d_in"], shape["r"], shape.get("blocksize", 64))


# 8 bits


def make_int8(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    W = torch.randn(shape["d_out"], shape["d_in"], generator=seed) * 0.02
    left, right = factors(shape, 1e-4, seed)
    zero = torch.zeros(W.shape, dtype=torch.int8)
    codes, scales = reference.requantize_add_int8(zero, torch.zeros(len(W)), W)
    return codes.to(device), scales.to(device), left.to(device), None if right is None else right.to(device)


def run_int8(inputs: Inputs, impl: str) -> Outputs:
    codes, scales, left, right = inputs
    codes, scales, share = operations.requantize_add_int8(codes, scales, left, right, impl)
    return reference.dequantize_int8(codes, scales), scales, beside_one(share)


def exact_int8(inputs: Inputs) -> Outputs:
    codes, scales, left, right = inputs
    change = product(left, right, torch.float64)
    old = reference.dequantize_int8(codes, scales.double())
    after = reference.dequantize_int8(*reference.requantize_add_int8(codes, scales, change))
    largest = (old + change).abs().amax(1) if codes.shape[1] else scales.double()
    return old + change, largest, lost(after, old, change)


def plain_int8(inputs: Inputs) -> Outputs:
    codes, scales, left, right = inputs
    change = product(left, right)
    after, largest = reference.requantize_add_int8(codes, scales, change)
    new = reference.dequantize_int8(after, largest)
    return new, largest, lost(new, reference.dequantize_int8(codes, scales), change)


def bitsandbytes_int8(inputs: Inputs) -> Outputs:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, left, right = inputs
    old, change = int8_vectorwise_dequant(codes, scales), product(left, right)
    after, largest, _ = int8_vectorwise_quant((old + change).half() if codes.is_cuda else old + change)
    new = int8_vectorwise_dequant(after, largest)
    return new, largest, lost(new, old, change)


def cost_int8(shape: Shape, dtype: torch.dtype) -> Cost:
    return requantize_add_int8_cost(shape["d_out"], shape["d_in"], shape["r"])


def timed(operation: Callable[..., object]) -> dict[str, Callable[[Inputs], object]]:
    """The operation alone, without reading back what it wrote."""
    return {impl: partial(_call, operation, impl) for impl in ("torch", "triton")}


def _call(operation: Callable[..., object], impl: str, inputs: Inputs) -> object:
    return operation(*inputs, impl)


SMALL = ({"d_out": 1600, "d_in": 6400, "r": 10}, {"d_out": 1600, "d_in": 6400, "r": 100})
LARGE = (
    {"d_out": 4096, "d_in": 14336, "r": 1},
    {"d_out": 4096, "d_in": 14336, "r": 100},
    {"d_out": 4096, "d_in": 16384, "r": 100},
)

SUBJECTS = (
    Subject(
        operation=operations.operation,
        make=make,
        run=run,
        exact=exact,
        plain=plain,
        cost=cost,
        odd=(
            {"d_out": 70, "d_in": 300, "r": 7},
            {"d_out": 64, "d_in": 64, "r": 16, "running": 1},
            {"d_out": 1, "d_in": 130, "r": 1},
            {"d_out": 130, "d_in": 1, "r": 20},
            {"d_out": 0, "d_in": 20, "r": 2},
            {"d_out": 20, "d_in": 0, "r": 2},
            {"d_out": 33, "d_in": 65, "r": 0},
            {"d_out": 50, "d_in": 70, "r": 4, "padded": 1},
            {"d_out": 100, "d_in": 70, "r": 33, "turned": 1, "running": 1},
            {"d_out": 70, "d_in": 90, "r": 3, "dense": 1, "running": 1},
            {"d_out": 70, "d_in": 90, "r": 3, "dense": 1, "turned": 1},
            {"d_out": 70, "d_in": 300, "r": 5, "stochastic": 1},
            {"d_out": 65, "d_in": 40, "r": 5, "stochastic": 1, "turned": 1, "running": 1},
        ),
        small=SMALL,
        large=LARGE,
    ),
    Subject(
        operation=operations.operation_4bit,
        make=make_4bit,
        run=run_4bit,
        exact=exact_4bit,
        plain=plain_4bit,
        cost=cost_4bit,
        odd=(
            {"d_out": 70, "d_in": 192, "r": 7},
            {"d_out": 1, "d_in": 64, "r": 1},
            {"d_out": 0, "d_in": 64, "r": 3},
            {"d_out": 33, "d_in": 128, "r": 0, "fp4": 1},
            {"d_out": 70, "d_in": 192, "r": 20, "fp4": 1},
            {"d_out": 65, "d_in": 320, "r": 3, "nested": 1},
            {"d_out": 20, "d_in": 256, "r": 3, "dense": 1, "nested": 1, "fp4": 1},
            {"d_out": 5, "d_in": 384, "r": 3, "blocksize": 128},
            {"d_out": 5, "d_in": 96, "r": 3, "blocksize": 32},
            {"d_out": 9, "d_in": 256, "r": 3, "blocksize": 256},
        ),
        small=SMALL,
        large=(*LARGE, {**LARGE[1], "nested": 1}),
        library={"bitsandbytes": bitsandbytes_4bit},
        timed=timed(operations.requantize_add_4bit),
        dtypes=(torch.float32,),
    ),
    Subject(
        operation=operations.operation_int8,
        make=make_int8,
        run=run_int8,
        exact=exact_int8,
        plain=plain_int8,
        cost=cost_int8,
        odd=(
            {"d_out": 70, "d_in": 300, "r": 7},
            {"d_out": 1, "d_in": 129, "r": 1},
            {"d_out": 17, "d_in": 1, "r": 2},
            {"d_out": 0, "d_in": 20, "r": 2},
            {"d_out": 20, "d_in": 0, "r": 2},
            {"d_out": 33, "d_in": 128, "r": 0},
            {"d_out": 30, "d_in": 200, "r": 3, "dense": 1},
        ),
        small=SMALL,
        large=LARGE,
        library={"bitsandbytes": bitsandbytes_int8},
        timed=timed(operations.requantize_add_int8),
        dtypes=(torch.float32,),
    ),
)
