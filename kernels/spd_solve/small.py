"""Many systems of up to 32 unknowns at once: one kernel launch where there is a GPU."""

import torch
from torch import Tensor

from ..dispatch import TORCH, Capability, Implementation, Operation
from .factor import Factor

MOST = 32  # unknowns; above it the libraries' batched factorisation wins


def small_factor_solve(A: Tensor, B: Tensor, scale: Tensor) -> tuple[Factor, Tensor, int]:
    """The scaled factor in fp64, the solution, and the row where Cholesky first broke down (0: nowhere).

    A: [..., n, n] fp32 or fp64, n <= 32; B: [..., n, k] fp64; scale: [..., n, 1] fp64, diag(A)^-1/2
    """
    n, k = B.shape[-2:]
    batch = A.shape[:-2].numel()
    scaled = (scale * A.double() * scale.mT).reshape(batch, n, n)
    L, Y, status = operation(scaled.contiguous(), (scale * B).reshape(batch, n, k).contiguous())
    first = next((row for row in status.tolist() if row), 0)  # the one wait for the device
    pivots = L.diagonal(dim1=-2, dim2=-1)
    condition = float("inf") if first else float((pivots.amax(-1) / pivots.amin(-1)).max() ** 2)
    factor = Factor(L.reshape(A.shape), scale, condition)
    return factor, scale * Y.reshape(B.shape), first


def _torch(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    L, status = torch.linalg.cholesky_ex(A)
    # two triangular solves: batched cholesky_solve is several times slower before torch 2.12
    Y = torch.linalg.solve_triangular(L, B, upper=False)
    return L, torch.linalg.solve_triangular(L.mT, Y, upper=True), status


def _triton(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernel  # here, so that the room imports where Triton is missing

    return kernel.small_solve(A, B)


# A: [b, n, n], B: [b, n, k], fp64 or fp32, contiguous -> (L [b, n, n] lower, X [b, n, k], status [b]: the row, counted
# from 1, where A stopped being positive definite, or 0); only A's lower triangle is read
operation = Operation(
    "small_solve",
    lambda A, B: {"n": A.shape[-1]},
    triton=Implementation(
        _triton, Capability("triton", "cuda", (8, 0), (torch.float32, torch.float64), {"n": (1, MOST)})
    ),
    torch=Implementation(_torch, TORCH),
)
