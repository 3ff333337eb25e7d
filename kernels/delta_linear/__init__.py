"""A linear map whose rows each carry their own low-rank delta: many single edits evaluated in one forward."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import TORCH, TRITON, WIDE, Capability, Implementation, Operation
from ..errors import InputError

_RANK = 64  # of one pass over x; higher ranks take several
_TOKENS = 4096  # bounds the fp32 copies of 16-bit activations


def add_delta_(y: Tensor, x: Tensor, left: Tensor, right: Tensor, group: Tensor, impl: str = "auto") -> None:
    """Add ``x[i] right[g]ᵀ left[g]ᵀ``, g = group[i], to row i of y, in place: what a hook on any module adds.

    y: [rows, T, d_out] or [rows, d_out] in x's dtype, last dimension contiguous: the map's output
    x: [rows, T, d_in] or [rows, d_in] fp32, fp16, bf16 or fp64, its input (copied once if a row is strided)
    left: [G, d_out, r] fp32 or x's dtype, any strides (fastest where a column is contiguous: r = 1, or a .mT view)
    right: [G, r, d_in] in left's dtype (copied once if its last dimension is strided)
    group: [rows] int64, the delta of each row; negative: none, and the row stays as it is bit for bit
    impl: "triton" (CUDA of compute capability >= 8.0, or the interpreter), "torch", or "auto": triton where it serves

    Sums are fp32; y in 16 bits is rounded once more by the addition, once for every 64 ranks. fp32 is never rounded to
    tf32 by the kernel; the torch implementation on CUDA obeys ``torch.backends.cuda.matmul``. fp32 factors beside bf16
    activations and a rank above 4 enter as the sum of two bf16 numbers. Two runs of one implementation agree bit for
    bit. No gradient. On a GPU nothing waits for the device (the torch implementation does): rows whose group is not
    below G become NaN there; on a CPU they are refused.

    Raises InputError: dtype, shape, device or layout is not as above, a gradient is wanted, or ``impl`` cannot serve.
    """
    _check("add_delta_", x, left, right, group)
    _no_gradient("add_delta_", y, x, left, right)
    expected = [*x.shape[:-1], left.shape[1]]
    if list(y.shape) != expected or y.dtype is not x.dtype or y.device != x.device:
        raise InputError(
            f"add_delta_: y is {_name(y)} on {y.device}; expected {expected} {_dtype(x)} on {x.device} for x {_name(x)}"
        )
    strides = [stride for stride, size in zip(y.stride()[:-1], y.shape[:-1], strict=True) if size > 1]
    if y.shape[-1] > 1 and (y.stride(-1) != 1 or any(stride < y.shape[-1] for stride in strides)):
        raise InputError(
            f"add_delta_: y has strides {y.stride()}; expected rows that do not overlap, last dimension contiguous"
        )
    _add(y, x, left, right, group, impl)


def delta_linear(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    group: Tensor,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``y = x weightᵀ + bias``, and to row i its delta ``x[i] right[g]ᵀ left[g]ᵀ``, g = group[i], no weight written.

    x: [rows, T, d_in] or [rows, d_in] fp32, fp16, bf16 or fp64
    weight: [d_out, d_in] in x's dtype, any strides (`Conv1D`: its ``weight.T``)
    left, right, group: as of :func:`add_delta_`
    bias: [d_out] in x's dtype, or None
    impl: as of :func:`add_delta_`; the product ``x weightᵀ`` is the library's by either
    -> y: [rows, T, d_out] or [rows, d_out] in x's dtype, contiguous

    Numerics and gradients: as of :func:`add_delta_`; y is rounded by the product first. On a GPU the first half of the
    delta runs on a stream of its own beside the product.

    Raises InputError: dtype, shape, device or layout is not as above, a gradient is wanted, or ``impl`` cannot serve.
    """
    _check("delta_linear", x, left, right, group)
    _no_gradient("delta_linear", x, weight, left, right, *([] if bias is None else [bias]))
    d_out, d_in = left.shape[1], x.shape[-1]
    for name, tensor, expected in (("weight", weight, [d_out, d_in]), ("bias", bias, [d_out])):
        if tensor is not None and (
            list(tensor.shape) != expected or tensor.dtype is not x.dtype or tensor.device != x.device
        ):
            raise InputError(
                f"delta_linear: {name} is {_name(tensor)} on {tensor.device}; "
                f"expected {expected} {_dtype(x)} on {x.device} for x {_name(x)}, left {_name(left)}"
            )
    if _nothing(x, left, right):
        return F.linear(x, weight, bias)
    x, group = _contiguous(x), group.contiguous()
    y: Tensor = operation(x, weight, left[..., :_RANK], _contiguous(right[:, :_RANK]), group, bias, impl=impl)
    _add(y, x, left[..., _RANK:], right[:, _RANK:], group, impl)
    return y


def _add(y: Tensor, x: Tensor, left: Tensor, right: Tensor, group: Tensor, impl: str) -> None:
    if _nothing(x, left, right):
        return
    x, group = _contiguous(x), group.contiguous()
    for start in range(0, left.shape[2], _RANK):
        ranks = slice(start, start + _RANK)
        add_operation(y, x, left[..., ranks], _contiguous(right[:, ranks]), group, impl=impl)


def _nothing(x: Tensor, left: Tensor, right: Tensor) -> bool:
    return 0 in (x.numel(), left.numel(), right.numel())


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _check(what: str, x: Tensor, left: Tensor, right: Tensor, group: Tensor) -> None:
    if x.ndim not in (2, 3) or x.dtype not in WIDE:
        raise InputError(
            f"{what}: x is {_name(x)}; expected [rows, T, d_in] or [rows, d_in] in float16 to float64 or bfloat16"
        )
    if left.ndim != 3 or left.dtype not in (torch.float32, x.dtype) or left.device != x.device:
        raise InputError(
            f"{what}: left is {_name(left)} on {left.device}; expected [G, d_out, r] "
            f"{' or '.join(dict.fromkeys(['float32', _dtype(x)]))} on {x.device}"
        )
    expected = [left.shape[0], left.shape[2], x.shape[-1]]
    if list(right.shape) != expected or right.dtype is not left.dtype or right.device != x.device:
        raise InputError(
            f"{what}: right is {_name(right)} on {right.device}; "
            f"expected {expected} {_dtype(left)} on {x.device} for x {_name(x)}, left {_name(left)}"
        )
    if group.shape != x.shape[:1] or group.dtype is not torch.int64 or group.device != x.device:
        raise InputError(
            f"{what}: group is {_name(group)} on {group.device}; expected [{len(x)}] int64 on {x.device}, "
            "the delta of each row of x"
        )
    if group.device.type == "cpu" and len(group) and int(group.max()) >= len(left):
        raise InputError(f"{what}: group holds {int(group.max())}; expected less than {len(left)}, the deltas of left")


def _no_gradient(what: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError(f"{what} has no gradient, and one is asked for; expected torch.no_grad() around it")


def _name(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {_dtype(tensor)}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tokens(tensor: Tensor) -> Tensor:
    """[rows, T, d]: one token a row where there is no such dimension."""
    return tensor if tensor.ndim == 3 else tensor[:, None]


@torch.no_grad()
def _add_torch(y: Tensor, x: Tensor, left: Tensor, right: Tensor, group: Tensor) -> None:
    y, x = _tokens(y), _tokens(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    live = (group >= 0).nonzero()[:, 0]
    step = max(1, _TOKENS // x.shape[1])
    whole = len(live) == len(group)  # slices are views, indices copy
    parts = [slice(i, i + step) for i in range(0, len(group), step)] if whole else live.split(step)
    for rows in parts:
        some, deltas = y[rows], group[rows]
        s = torch.bmm(x[rows].to(wide), right[deltas].to(wide).mT)
        u = left[deltas].to(wide).mT
        if y.dtype is not wide:
            some += torch.bmm(s, u)
        elif s.shape[2] == 1:
            some.addcmul_(s, u)  # a third of the time of baddbmm on a CPU
        else:
            some.baddbmm_(s, u)
        if not whole:
            y[rows] = some


@torch.no_grad()
def _add_triton(y: Tensor, x: Tensor, left: Tensor, right: Tensor, group: Tensor) -> None:
    from . import kernel  # here, so that the room imports where Triton is missing

    y, x = _tokens(y), _tokens(x)
    s = kernel.partial_sums(x, right)
    kernel.shrink(s, x, right, group)
    kernel.expand_(y, s, left, group)


@torch.no_grad()
def _torch(x: Tensor, weight: Tensor, left: Tensor, right: Tensor, group: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x, weight, bias)
    _add_torch(y, x, left, right, group)
    return y


@torch.no_grad()
def _triton(x: Tensor, weight: Tensor, left: Tensor, right: Tensor, group: Tensor, bias: Tensor | None) -> Tensor:
    from . import kernel

    s = kernel.partial_sums(_tokens(x), right)
    if not x.is_cuda:
        y = F.linear(x, weight, bias)
        kernel.shrink(s, _tokens(x), right, group)
    else:
        # the product computes and shrink reads. Launched behind it, shrink takes the multiprocessors that the product's
        # last wave leaves idle; before it, it would hold some that a persistent product counts on
        stream, beside = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
        beside.wait_event(stream.record_event())
        y = F.linear(x, weight, bias)
        with torch.cuda.stream(beside):
            kernel.shrink(s, _tokens(x), right, group)
        stream.wait_stream(beside)
    kernel.expand_(_tokens(y), s, left, group)
    return y


_SERVES = Capability(TRITON.package, TRITON.device, TRITON.compute, TRITON.dtypes, {"rank": (1, _RANK)})

add_operation = Operation(
    "add_delta_",
    sizes=lambda y, x, left, right, group: {"rank": left.shape[2]},
    triton=Implementation(_add_triton, _SERVES),
    torch=Implementation(_add_torch, TORCH),
)
operation = Operation(
    "delta_linear",
    sizes=lambda x, weight, left, right, group, bias: {"rank": left.shape[2]},
    triton=Implementation(_triton, _SERVES),
    torch=Implementation(_torch, TORCH),
)
