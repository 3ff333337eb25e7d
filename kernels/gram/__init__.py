"""Uncentred second moment: C += XᵀX, only its lower triangle, at half the work of the full product."""

import torch

from ..dispatch import FLOATS, TORCH, TRITON, Implementation, Operation
from ..errors import InputError

# measured on CPU (docs/numerics.md): 0.55-0.66 of the time of one full product at d = 1024..3072
_BLOCK = 256
_ROWS = 4096


@torch.no_grad()
def gram_(C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None = None, impl: str = "auto") -> None:
    """Add XᵀX, or Xᵀ diag(weight) X, to the lower triangle of C, in place.

    C: [d, d] fp32, last dimension contiguous, the sum so far (not a mean)
    X: [T, d] fp32, fp16 or bf16, T >= 0, rows at any stride (copied once if its last dimension is not contiguous)
    weight: [T] fp32 or bool, of each row; False or 0 leaves a row out (padding), whatever finite numbers it holds
    impl: "triton" (CUDA of compute capability >= 8.0, or the interpreter), "torch", or "auto": triton where it serves

    Afterwards the elements ``C[i, j]`` with ``j <= i`` hold what they held plus ``sum_t weight[t] X[t, i] X[t, j]``.
    Those strictly above the diagonal are **undefined**: never read them before one :func:`mirror_` after the last call.

    Sums are fp32. The kernel multiplies 16-bit keys exactly, on tensor cores, and adds up at most 32768 tokens before
    an ordinary fp32 addition to C; fp32 keys are split into bf16, three products of two parts, six of three parts on
    the diagonal and for few tokens (docs/numerics.md). A weighted key is rounded once, to the dtype of X, which must
    hold it. The torch implementation on CUDA obeys ``torch.backends.cuda.matmul``. The error grows with what C already
    holds: fold it into fp64 now and then. Two runs of one implementation on one GPU agree bit for bit.

    Raises InputError: dtype, shape, device or layout is not as above, or ``impl`` cannot serve these arguments.
    """
    if X.ndim != 2 or X.dtype not in FLOATS:
        raise InputError(f"gram_: X is {_name(X)}; expected [T, d] in float32, float16 or bfloat16")
    d = X.shape[1]
    if C.shape != (d, d) or C.dtype is not torch.float32:
        raise InputError(f"gram_: C is {_name(C)}; expected [{d}, {d}] float32 for X {_name(X)}")
    if C.device != X.device:
        raise InputError(f"gram_: C is on {C.device}, X on {X.device}; expected one device")
    if d > 1 and (C.stride(1) != 1 or C.stride(0) < d):
        raise InputError(
            f"gram_: C has strides {C.stride()}; expected rows that do not overlap, contiguous in the last dimension"
        )
    if weight is not None:
        if weight.shape != X.shape[:1] or weight.dtype not in (torch.float32, torch.bool) or weight.device != X.device:
            found = f"{_name(weight)} on {weight.device}"
            raise InputError(f"gram_: weight is {found}; expected [{len(X)}] float32 or bool on {X.device}")
        weight = weight.float().contiguous()
    if X.numel() == 0:
        return
    operation(C, X if d == 1 or X.stride(1) == 1 else X.contiguous(), weight, impl=impl)


@torch.no_grad()
def mirror_(C: torch.Tensor) -> None:
    """Copy the lower triangle of ``C: [d, d]`` (any dtype) onto the upper one, in place: then C equals Cᵀ exactly.

    What the upper triangle held, NaN included, does not matter. Works block by block: no temporary of the size of C.

    Raises InputError: C is not square.
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise InputError(f"mirror_: C is {_name(C)}; expected a square matrix")
    for start in range(0, len(C), _BLOCK):
        rows = slice(start, start + _BLOCK)
        C[:start, rows] = C[rows, :start].T
        diagonal = C[rows, rows]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)


def _name(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _torch(C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None) -> None:
    if X.is_cuda and X.dtype is not torch.float32:
        # fp32 sums straight from 16-bit inputs; exists on CUDA only, untested where this was written
        right = X if weight is None else torch.mul(X, weight[:, None], out=torch.empty_like(X))
        torch.addmm(C, X.T, right, out_dtype=torch.float32, out=C)
        return
    for start in range(0, len(X), _ROWS):  # bounds the fp32 copy of 16-bit keys
        rows = slice(start, start + _ROWS)
        keys = X[rows].float()
        right = keys if weight is None else keys * weight[rows, None]
        for block in range(0, keys.shape[1], _BLOCK):
            end = block + _BLOCK
            C[block:end, :end].addmm_(keys[:, block:end].T, right[:, :end])


def _triton(C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None) -> None:
    from . import kernel  # here, so that the room imports where Triton is missing

    kernel.gram_lower_(C, X, weight)


operation = Operation(
    "gram_",
    triton=Implementation(_triton, TRITON),
    torch=Implementation(_torch, TORCH),
)
