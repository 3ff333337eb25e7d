"""Triton: losses and their gradient in one walk over the vocabulary, as attention does it.

The vocabulary comes in parts. Of each part: logits by the library's product, one kernel that brings the rows' running
maxima and sums up to date and puts exp(logit - maximum) in the logits' place, and the product of these with the
part's head rows, added to an accumulator that follows the maximum. Nothing as wide as the vocabulary exists, so that
products have a thousand rows; a 16-bit exp is written over the first half of its own row's fp32 logits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuned import pick
from ..variants import Variant


@dataclass(frozen=True)
class Config:
    """rows x part (a power of two) logits exist at once; one program a row."""

    rows: int
    part: int
    num_warps: int


# The first is launched, the others wait for a GPU to tune on. A part is added to the accumulator, d fp32 numbers a row,
# so a wider one saves traffic; 1024 x 8192 are 34 MB of logits, which mostly stay in the L2 cache of an H200.
CONFIGS = (
    Config(1024, 8192, 16),
    Config(1024, 8192, 8),
    Config(2048, 4096, 16),
    Config(1024, 4096, 16),
    Config(512, 16384, 32),
)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """The interpreter has no libdevice. Near 0, where 1 - e would cancel, a series: 2e-8 off at 0.3."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835 - s * (1382.0 / 155925)))))
    return tl.where(tl.abs(x) < 0.3, x * near, tl.where(x < 0, -far, far))


@triton.jit
def read(  # type: ignore[no-untyped-def]
    row_ptr, lanes, bias_ptr, start, width, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr
):
    """A part's logits of a row, -inf behind its end."""
    z = tl.load(row_ptr + lanes)  # the buffer is as wide as a block
    if HAS_BIAS:
        z += tl.load(bias_ptr + start + lanes, mask=lanes < width, other=0.0).to(tl.float32)
    if HAS_CAP:
        z = tanh(tl.where(lanes < width, z, 0.0) / softcap) * softcap
    return tl.where(lanes < width, z, float("-inf"))


@triton.jit
def follow(z, top_ptr, total_ptr):  # type: ignore[no-untyped-def]
    """Brings a row's maximum and its sum of exp(z - maximum) up to date: exp of this part, scale of earlier ones."""
    before = tl.load(top_ptr)
    # NaN need not pass a maximum; it passes the sum
    top = tl.maximum(before, tl.max(z, 0))
    e = tl.exp(z - top)
    scale = tl.exp(before - top)
    total = tl.load(total_ptr) * scale + tl.sum(e, 0)
    tl.store(top_ptr, top)
    tl.store(total_ptr, total)
    return e, scale, total


@triton.jit(do_not_specialize=["width"])
def label_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [rows, BLOCK] fp32, of which `width` columns are the vocabulary's from `start` on
    exp_ptr,  # the same memory in the head's dtype: exp(logit - top), times the cap's slope
    label_ptr,  # [rows] int64
    picked_ptr,  # [rows] fp32, the label's logit, written by the part that holds it
    top_ptr,  # [rows] fp32, so far, and so on
    total_ptr,
    scale_ptr,  # [rows] fp32, what this part's maximum makes of earlier parts' sums
    bias_ptr,  # [vocab]
    softcap,
    start,
    width,
    exp_stride,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    z = read(logits_ptr + row * BLOCK, lanes, bias_ptr, start, width, softcap, HAS_BIAS, HAS_CAP)
    e, scale, _ = follow(z, top_ptr + row, total_ptr + row)
    tl.store(scale_ptr + row, scale)
    at = tl.load(label_ptr + row) - start
    picked = tl.sum(tl.where(lanes == at, z, 0.0), 0)
    tl.store(picked_ptr + row, picked, mask=(at >= 0) & (at < width))
    if GRADIENT:
        if HAS_CAP:
            e = tl.where(lanes < width, e * (1.0 - (z / softcap) * (z / softcap)), 0.0)
        tl.debug_barrier()  # all threads have read the row that is now overwritten
        tl.store(exp_ptr + row * exp_stride + lanes, e.to(exp_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["width", "rows"])
def kl_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [2 rows, BLOCK] fp32: now, then as many of then; further as label_kernel
    exp_ptr,  # rows of now: exp(now - top); rows of then: that times (now - then - centre)
    gaps_ptr,  # [rows] fp32, sum of exp(now - top) (now - then) so far
    centre_ptr,  # [rows] fp32, mean of now - then over the first part: 16 bits then round what is left of it
    top_ptr,  # [2 rows] fp32, of now and of then
    total_ptr,
    scale_ptr,  # [2 rows] fp32
    bias_ptr,
    softcap,
    start,
    width,
    exp_stride,
    rows,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    other = row + rows
    lanes = tl.arange(0, BLOCK)
    y = read(logits_ptr + other * BLOCK, lanes, bias_ptr, start, width, softcap, HAS_BIAS, HAS_CAP)
    follow(y, top_ptr + other, total_ptr + other)
    z = read(logits_ptr + row * BLOCK, lanes, bias_ptr, start, width, softcap, HAS_BIAS, HAS_CAP)
    gap = tl.where(lanes < width, z - y, 0.0)
    e, scale, total = follow(z, top_ptr + row, total_ptr + row)
    tl.store(scale_ptr + row, scale)
    tl.store(scale_ptr + other, scale)
    gaps = tl.load(gaps_ptr + row) * scale + tl.sum(e * gap, 0)
    tl.store(gaps_ptr + row, gaps)
    if GRADIENT:
        if start == 0:
            centre = gaps / total
            tl.store(centre_ptr + row, centre)
        else:
            centre = tl.load(centre_ptr + row)
        if HAS_CAP:
            e = tl.where(lanes < width, e * (1.0 - (z / softcap) * (z / softcap)), 0.0)
        tl.debug_barrier()
        tl.store(exp_ptr + row * exp_stride + lanes, e.to(exp_ptr.dtype.element_ty))
        tl.store(exp_ptr + other * exp_stride + lanes, (e * (gap - centre)).to(exp_ptr.dtype.element_ty))


def rows(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    first: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of each row, [rows] fp32, whether its label is missed, [m] fp32, and the gradient, [rows, d] as hidden."""
    count, m = len(hidden), len(labels)
    config = pick("target_nll", f"{hidden.itemsize * 8}bit", CONFIGS)
    loss, missed = (hidden.new_empty(size, dtype=torch.float32) for size in (count, m))
    gradient = hidden.new_empty(hidden.shape) if wanted else None
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    part = min(config.part, triton.next_power_of_2(len(head)))
    buffer = hidden.new_empty(min(config.rows, m + 2 * (count - m)), part, dtype=torch.float32)
    start = 0
    while start < count:
        a = min(config.rows, max(0, m - start))
        b = min((config.rows - a) // 2, count - start - a)
        chunk = slice(start, start + a + b)
        read = hidden[chunk]
        if b:
            assert first is not None
            at = start + a - m
            read = torch.cat([read, first[at : at + b]])
        _chunk(
            read,
            head,
            labels[start : start + a],
            bias,
            softcap,
            buffer[: a + 2 * b],
            config.num_warps,
            loss[chunk],
            missed[start : start + a],
            None if gradient is None else gradient[chunk],
        )
        start += a + b
    return loss, missed, gradient


def _chunk(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    buffer: Tensor,
    num_warps: int,
    loss: Tensor,
    missed: Tensor,
    gradient: Tensor | None,
) -> None:
    """hidden: a rows with a label, b KL rows, and what these were first; buffer: [a + 2 b, part] fp32"""
    a = len(labels)
    n = len(loss)
    part = buffer.shape[1]
    top = loss.new_full((len(hidden),), -3e38)  # finite, so that no difference is of two infinities
    total = torch.zeros_like(top)
    scale = torch.empty_like(top)
    picked = loss.new_full((a,), torch.nan)  # what a label out of range gets
    gaps, centre = loss.new_zeros(2, n - a)
    sums = None if gradient is None else loss.new_empty(hidden.shape)
    exp = buffer if sums is None else buffer.view(head.dtype)
    options = {
        "bias_ptr": buffer if bias is None else bias,
        "softcap": 1.0 if softcap is None else softcap,
        "exp_stride": exp.stride(0),
        "HAS_BIAS": bias is not None,
        "HAS_CAP": softcap is not None,
        "GRADIENT": sums is not None,
        "BLOCK": part,
        "num_warps": num_warps,
    }
    with torch.cuda.device_of(hidden):  # Triton launches on the current device; no-op on the CPU
        for start in range(0, len(head), part):
            of_part = head[start : start + part]
            width = len(of_part)
            _product(buffer[:, :width], hidden, of_part.T, beta=0)
            if a:
                label_kernel[(a,)](buffer, exp, labels, picked, top, total, scale, start=start, width=width, **options)
            if n > a:
                kl_kernel[(n - a,)](
                    buffer[a:], exp[a:], gaps, centre, top[a:], total[a:], scale[a:],
                    start=start, width=width, rows=n - a, **options,
                )  # fmt: skip
            if sums is not None:
                if start:
                    sums *= scale[:, None]
                _product(sums, exp[:, :width], of_part, beta=min(start, 1))

    mean = gaps / total[a:n]
    loss[:a] = (top[:a] - picked) + total[:a].log()
    missed[:] = (picked != top[:a]) | loss[:a].isnan()  # a maximum may pass over NaN
    # sum p (log p - log q); the log sums in two parts, each subtracted for itself
    loss[a:] = mean - ((top[a:n] - top[n:]) + (total[a:n].log() - total[n:].log()))
    if sums is not None and gradient is not None:
        sums[:n] /= total[:n, None]
        known = labels.clamp(0, len(head) - 1)
        if softcap is None:
            sums[:a] -= head[known]
        else:
            sums[:a] -= head[known] * (1 - (picked / softcap) ** 2)[:, None]
        # p (gap - mean)
        gradient[:a] = sums[:a]
        gradient[a:] = sums[n:] / total[a:n, None] - sums[a:n] * (mean - centre)[:, None]


def _product(out: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """out = beta out + left right, out and sums fp32; with beta 0 whatever was in out."""
    if left.dtype is torch.float32:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif left.is_cuda:  # exists on CUDA only, untested where this was written
        torch.addmm(out, left, right, out_dtype=torch.float32, beta=beta, out=out)
    else:
        torch.addmm(out, left.float(), right.float(), beta=beta, out=out)


ALIGNED = ("logits_ptr", "exp_ptr", "bias_ptr", "start", "exp_stride")
TYPES = {"label_ptr": "*i64", "softcap": "fp32"} | {
    f"{name}_ptr": "*fp32" for name in ("logits", "picked", "gaps", "centre", "top", "total", "scale")
}


def variants() -> list[Variant]:
    """What gate B compiles: every configuration with bias and cap and without; once other dtypes and the loss alone."""
    found = []
    for kernel in (label_kernel, kl_kernel):
        for config in CONFIGS:
            default = config is CONFIGS[0]
            for dtype, extras, gradient in (
                ("bf16", False, True),
                ("bf16", True, True),
                *((("fp16", False, True), ("fp32", True, True), ("bf16", False, False)) if default else ()),
            ):
                flags = ("-bias-cap" if extras else "") + ("" if gradient else "-loss")
                types = TYPES | {"exp_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
                found.append(
                    Variant(
                        name=f"target_nll-{kernel.__name__}-{dtype}-{config.rows}x{config.part}-w{config.num_warps}{flags}",
                        kernel=kernel,
                        types={name: types[name] for name in types if name in kernel.arg_names},
                        constants={
                            "HAS_BIAS": extras,
                            "HAS_CAP": extras,
                            "GRADIENT": gradient,
                            "BLOCK": config.part,
                        },
                        aligned=ALIGNED,
                        num_warps=config.num_warps,
                        default=default,
                    )
                )
    return found
