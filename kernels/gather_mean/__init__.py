"""Vectors at one token of each row: their weighted sums by group, in place, and the twin that adds a vector there."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import TORCH, TRITON, WIDE, Implementation, Operation
from ..errors import InputError


@torch.no_grad()
def gather_mean_(
    K: Tensor, X: Tensor, position: Tensor, group: Tensor, weight: Tensor | None = None, impl: str = "auto"
) -> None:
    """Add each row's vector at one token, times its weight, to a row of K, in place: K[group[r]] += w[r] X[r, p[r]].

    With weights that sum to 1 over each group, spread over as many calls as it takes, K ends as the weighted means.

    K: [n, d] fp32, rows at any stride, last dimension contiguous: the sums so far
    X: [rows, T, d] fp32, fp16, bf16 or fp64, at any strides (copied once for the kernel if its last dimension is not
       contiguous): activations; other tokens than those at `position` are never read
    position: [rows] int64, 0 <= position < T: the token that is read
    group: [rows] int64, 0 <= group < n: the row of K that it is added to; rows of a group need not be neighbours
    weight: [rows] fp32; None: all 1
    impl: "triton" (CUDA of compute capability >= 8.0, or the interpreter), "torch", or "auto": triton where it serves

    Products and sums are fp32, rows are added in their order (on CUDA torch chooses its own): two runs of one
    implementation agree bit for bit. On CUDA indices are not checked, since that would wait for the device: by triton
    a wrong position makes its group NaN and a row of no group is left out; torch stops with a device-side assertion.

    Raises InputError: dtype, shape, device or layout is not as above, an index is out of range (of CPU tensors), or
    ``impl`` cannot serve these arguments.
    """
    if X.ndim != 3 or X.dtype not in WIDE:
        raise InputError(f"gather_mean_: X is {_name(X)}; expected [rows, T, d] in float16 to float64 or bfloat16")
    rows, T, d = X.shape
    if K.ndim != 2 or K.shape[1] != d or K.dtype is not torch.float32:
        raise InputError(f"gather_mean_: K is {_name(K)}; expected [n, {d}] float32 for X {_name(X)}")
    if len(K) and d and ((d > 1 and K.stride(1) != 1) or (len(K) > 1 and K.stride(0) < d)):
        raise InputError(
            f"gather_mean_: K has strides {K.stride()}; "
            "expected rows that do not overlap, contiguous in the last dimension"
        )
    if K.device != X.device:
        raise InputError(f"gather_mean_: K is on {K.device}, X on {X.device}; expected one device")
    _check_index("gather_mean_", "position", position, X, T)
    _check_index("gather_mean_", "group", group, X, len(K))
    if weight is not None and (
        weight.shape != (rows,) or weight.dtype is not torch.float32 or weight.device != X.device
    ):
        raise InputError(
            f"gather_mean_: weight is {_name(weight)} on {weight.device}; expected [{rows}] float32 on {X.device}"
        )
    if X.numel():
        gather_operation(K, X, position, group, weight, impl=impl)


def scatter_add(H: Tensor, position: Tensor, group: Tensor, delta: Tensor, impl: str = "auto") -> Tensor:
    """H with a vector added at one token of each row: out[r, position[r]] = H[r, position[r]] + delta[group[r]].

    H: [rows, T, d] fp32, fp16, bf16 or fp64, at any strides (copied once more for the kernel if its last dimension is
       not contiguous): hidden states
    position: [rows] int64, 0 <= position < T: the token that changes
    group: [rows] int64, 0 <= group < n: the row of delta that is added there
    delta: [n, d] fp32
    impl: as of :func:`gather_mean_`, forward and backward

    Returns [rows, T, d] in H's dtype, contiguous, a tensor of its own: the sum is fp32 and rounded once, other tokens
    keep their bits. Differentiable, once, in H (the gradient as it comes) and in delta (each of its rows gets the sum
    over its group of the gradient at `position`, by :func:`gather_mean_`, in fp32). Out-of-range indices on CUDA are
    as there: by triton a wrong group adds NaN, a wrong position nothing.

    Raises InputError: dtype, shape or device is not as above, an index is out of range (of CPU tensors), or ``impl``
    cannot serve these arguments.
    """
    if H.ndim != 3 or H.dtype not in WIDE:
        raise InputError(f"scatter_add: H is {_name(H)}; expected [rows, T, d] in float16 to float64 or bfloat16")
    if delta.ndim != 2 or delta.shape[1] != H.shape[2] or delta.dtype is not torch.float32:
        raise InputError(f"scatter_add: delta is {_name(delta)}; expected [n, {H.shape[2]}] float32 for H {_name(H)}")
    if delta.device != H.device:
        raise InputError(f"scatter_add: delta is on {delta.device}, H on {H.device}; expected one device")
    _check_index("scatter_add", "position", position, H, H.shape[1])
    _check_index("scatter_add", "group", group, H, len(delta))
    out: Tensor = _ScatterAdd.apply(H, position, group, delta, impl)
    return out


class _ScatterAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, H: Tensor, position: Tensor, group: Tensor, delta: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(position, group)
        ctx.n = len(delta)
        if not H.numel():
            return H.clone()
        # serves backward too: what `using` asks for does not reach the threads of autograd
        ctx.impl = scatter_operation.choose(H, position, group, delta, impl=impl)
        out: Tensor = scatter_operation(H, position, group, delta, impl=ctx.impl)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        position, group = ctx.saved_tensors
        of_delta = None
        if ctx.needs_input_grad[3]:
            of_delta = grad.new_zeros(ctx.n, grad.shape[2], dtype=torch.float32)
            if grad.numel():
                gather_operation(of_delta, grad, position, group, None, impl=ctx.impl)
        return grad, None, None, of_delta, None


def _check_index(operation: str, name: str, index: Tensor, X: Tensor, size: int) -> None:
    if index.shape != X.shape[:1] or index.dtype is not torch.int64 or index.device != X.device:
        raise InputError(
            f"{operation}: {name} is {_name(index)} on {index.device}; expected [{len(X)}] int64 on {X.device}"
        )
    if index.device.type == "cpu" and len(index):
        least, most = (int(end) for end in index.aminmax())
        if least < 0 or most >= size:
            raise InputError(f"{operation}: {name} goes from {least} to {most}; expected 0 to {size - 1}")


def _name(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _inner_contiguous(X: Tensor) -> Tensor:
    return X if X.shape[-1] == 1 or X.stride(-1) == 1 else X.contiguous()


def _gather_torch(K: Tensor, X: Tensor, position: Tensor, group: Tensor, weight: Tensor | None) -> None:
    found = X[torch.arange(len(X), device=X.device), position].float()
    if weight is not None:
        found *= weight[:, None]
    if K.is_cuda:
        K.index_put_((group,), found, accumulate=True)  # sorts; index_add_ has atomics there
    else:
        K.index_add_(0, group, found)


def _gather_triton(K: Tensor, X: Tensor, position: Tensor, group: Tensor, weight: Tensor | None) -> None:
    from . import kernel  # here, so that the room imports where Triton is missing

    weight = None if weight is None else weight.contiguous()
    kernel.gather_mean_(K, _inner_contiguous(X), position.contiguous(), group.contiguous(), weight)


def _scatter_torch(H: Tensor, position: Tensor, group: Tensor, delta: Tensor) -> Tensor:
    out = H.clone(memory_format=torch.contiguous_format)
    tokens = out.view(-1, H.shape[2])  # one index, and by these calls: a third of the time of out[rows, position] = ...
    at = torch.arange(0, len(tokens), H.shape[1], device=H.device) + position
    moved = tokens.index_select(0, at) + delta.index_select(0, group)  # in fp32, or in H's fp64
    tokens.index_copy_(0, at, moved.to(H.dtype))
    return out


def _scatter_triton(H: Tensor, position: Tensor, group: Tensor, delta: Tensor) -> Tensor:
    from . import kernel

    return kernel.scatter_add(_inner_contiguous(H), position.contiguous(), group.contiguous(), _inner_contiguous(delta))


gather_operation = Operation(
    "gather_mean_",
    triton=Implementation(_gather_triton, TRITON),
    torch=Implementation(_gather_torch, TORCH),
)
scatter_operation = Operation(
    "scatter_add",
    triton=Implementation(_scatter_triton, TRITON),
    torch=Implementation(_scatter_torch, TORCH),
)
