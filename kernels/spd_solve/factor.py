"""The Cholesky factor of a Jacobi-scaled matrix, kept for many solves; of one matrix or of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .info import SolveError

_BLOCK = 512  # rows of A in fp64 at a time: 64 MiB at n = 16384
_ASYMMETRY = 1e-3  # of sqrt(a_ii a_jj): sums in any order stay far below, an unmirrored triangle far above


@dataclass(frozen=True, eq=False)
class Factor:
    """S A S = L Lᵀ with S = diag(A)^-1/2.

    L: [..., n, n] fp64 or fp32, lower triangular
    scale: [..., n, 1] fp64, the diagonal of S
    condition: lower bound of the scaled matrix's condition: (max diag L / min diag L)²; the worst of a batch
    """

    L: Tensor
    scale: Tensor
    condition: float

    @property
    def dtype(self) -> str:
        return str(self.L.dtype).removeprefix("torch.")

    def to(self, device: torch.device) -> "Factor":
        return Factor(self.L.to(device), self.scale.to(device), self.condition)

    def half_solve(self, B: Tensor) -> Tensor:
        """``V = L⁻¹ S B``: [..., n, k] in L's dtype, so that ``Vᵀ V = Bᵀ A⁻¹ B``."""
        scaled = (self.scale * B).to(self.L.dtype)
        return torch.linalg.solve_triangular(self.L, scaled, upper=False, out=scaled)  # in place: fresh memory is slow

    def other_half(self, V: Tensor) -> Tensor:
        """``S L⁻ᵀ V``: [..., n, k] fp64: ``other_half(half_solve(B)) = A⁻¹ B``."""
        return torch.linalg.solve_triangular(self.L.mT, V, upper=True).double().mul_(self.scale)

    def solve(self, B: Tensor) -> Tensor:
        """``A⁻¹ B``: [..., n, k] fp64, as good as the factor; nothing is checked."""
        return self.other_half(self.half_solve(B))


def fast_dtype(device: torch.device) -> torch.dtype:
    """What to factor in: float64, but float32 (refined) on GPUs whose fp64 runs at 1/32 or 1/64 of fp32's rate."""
    if device.type != "cuda":
        return torch.float64
    # A100, H100 and H200, B200: the chips with fp64 tensor cores
    return torch.float64 if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0)) else torch.float32


@torch.no_grad()
def factorize(A: Tensor, dtype: torch.dtype | None = None) -> Factor:
    """The factor of A, which is not changed.

    A: [..., n, n] fp32 or fp64, symmetric positive definite, both triangles filled (``gram.mirror_``); leading
        dimensions are independent matrices (layers, lambdas)
    dtype: float64, float32, or None: what is fast where A is, and float64 where that breaks down

    Memory: two [..., n, n] of ``dtype``, and blocks of rows.
    Raises InputError: shape or dtype is not as above, NaN or infinity in A, A not symmetric.
    Raises SolveError: A is not positive definite.
    Source: Jacobi scaling is within a factor n of the best diagonal scaling (van der Sluis 1969).
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(f"factorize: dtype={dtype}; expected torch.float32 or torch.float64")
    scale = checked_scale(A)
    attempts = (dtype,) if dtype else tuple(dict.fromkeys((fast_dtype(A.device), torch.float64)))
    for attempt in attempts:
        factor, broke = try_factor(A, scale, attempt)
        if not broke:
            return factor
    raise broken(A, broke, attempts[-1])


def try_factor(A: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Factor, int]:
    """The factor, and the row where Cholesky first broke down (0: nowhere)."""
    scaled = torch.empty(A.shape, dtype=dtype, device=A.device)
    for rows in blocks(A.shape[-1]):
        scaled[..., rows, :] = (scale[..., rows, :] * A[..., rows, :].double()).mul_(scale.mT)
    L, status = torch.linalg.cholesky_ex(scaled)
    del scaled
    pivots = L.diagonal(dim1=-2, dim2=-1).double()
    spread = (pivots.amax(-1) / pivots.amin(-1)) ** 2
    broke = status.flatten().tolist()  # the one wait for the device
    first = next((row for row in broke if row), 0)
    return Factor(L, scale, float(spread.max())), first


def broken(A: Tensor, row: int, dtype: torch.dtype) -> SolveError:
    # Cholesky ends well if the smallest eigenvalue is above about n eps; the largest is at least 1, the diagonal
    n = A.shape[-1]
    what = f"A is not positive definite (Cholesky broke down at row {row} of {n})"
    return SolveError(what, torch.nan, 1 / (n * torch.finfo(dtype).eps))


def checked_scale(A: Tensor) -> Tensor:
    """diag(A)^-1/2 as ``[..., n, 1] fp64``, once everything that can be known before factoring has been checked."""
    check_matrix(A)
    diagonal = A.diagonal(dim1=-2, dim2=-1).double()
    dead = (diagonal <= 0).nonzero()
    if len(dead):
        what = f"{len(dead)} of {diagonal.numel()} diagonal elements are not positive, the first in row {dead[0, -1]}"
        raise SolveError(f"A is not positive definite: {what}", torch.nan, torch.inf)
    scale = diagonal.rsqrt()[..., None]
    refuse_asymmetric(A, scale)
    return scale


def check_matrix(A: Tensor) -> None:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or not A.numel() or A.dtype not in (torch.float32, torch.float64):
        raise InputError(f"spd_solve: A is {list(A.shape)} {A.dtype}; expected [..., n, n] in float32 or float64")
    refuse_nonfinite(A, "A")


def refuse_asymmetric(A: Tensor, scale: Tensor) -> None:
    """scale: [..., n, 1] fp64, diag(A)^-1/2: what the difference of the triangles is measured by."""
    for rows in blocks(A.shape[-1]):
        skew = (A[..., rows, :].double() - A[..., rows].mT.double()).abs_().mul_(scale[..., rows, :]).mul_(scale.mT)
        if float(skew.max()) > _ASYMMETRY:
            raise InputError("spd_solve: A is not symmetric; was only one triangle filled (gram.mirror_)?")


def refuse_nonfinite(matrix: Tensor, name: str) -> None:
    if not all(bool(matrix[..., rows, :].isfinite().all()) for rows in blocks(matrix.shape[-2])):
        raise InputError(f"spd_solve: {name} holds NaN or infinity")


def blocks(n: int, size: int = _BLOCK) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))
