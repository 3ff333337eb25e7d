"""The Cholesky factor of a Jacobi-scaled matrix, kept for many solves; of one matrix or of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from .info import SolveError

RIDGE = 1e-6  # of the mean diagonal: what a second moment without full rank gets
_BLOCK = 512  # rows of A in fp64 at a time: 64 MiB at n = 16384
_ASYMMETRY = 1e-3  # of sqrt(a_ii a_jj): sums in any order stay far below, an unmirrored triangle far above


@dataclass(frozen=True, eq=False)
class Factor:
    """S (A + ridge I) S = L Lᵀ with S = diag(A + ridge I)^-1/2.

    L: [..., n, n] fp64 or fp32, lower triangular
    scale: [..., n, 1] fp64, the diagonal of S
    condition: lower bound of the scaled matrix's condition: (max diag L / min diag L)²; the worst of a batch
    ridge: 0 where A could be factored as it is
    why: what A lacked where the ridge is not 0
    """

    L: Tensor
    scale: Tensor
    condition: float
    ridge: float = 0.0
    why: str = ""

    @property
    def dtype(self) -> str:
        return str(self.L.dtype).removeprefix("torch.")

    def to(self, device: torch.device) -> "Factor":
        return replace(self, L=self.L.to(device), scale=self.scale.to(device))

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
def factorize(A: Tensor, dtype: torch.dtype | None = None, ridge: float = 0.0) -> Factor:
    """The factor of A + ridge I; A is not changed.

    A: [..., n, n] fp32 or fp64, symmetric positive definite, both triangles filled (``gram.mirror_``); leading
        dimensions are independent matrices (layers, lambdas)
    dtype: float64, float32, or None: what is fast where A is, and float64 where that breaks down
    ridge: >= 0, in A's units

    Memory: two [..., n, n] of ``dtype``, and blocks of rows.
    Raises InputError: shape or dtype is not as above, NaN or infinity in A, A not symmetric.
    Raises SolveError: A + ridge I is not positive definite.
    Source: Jacobi scaling is within a factor n of the best diagonal scaling (van der Sluis 1969).
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(f"factorize: dtype={dtype}; expected torch.float32 or torch.float64")
    scale = checked_scale(A, ridge)
    attempts = (dtype,) if dtype else tuple(dict.fromkeys((fast_dtype(A.device), torch.float64)))
    for attempt in attempts:
        factor, broke = try_factor(A, scale, attempt, ridge)
        if not broke:
            return factor
    raise broken(A, broke, attempts[-1])


@torch.no_grad()
def regular_factor(C: Tensor) -> Factor:
    """The factor of a second moment, with a ridge of 1e-6 of its mean diagonal where it has no full rank.

    C: [n, n] fp32 or fp64, as for `factorize`. It counts as rank-deficient where a diagonal element is 0 (a unit that
    never fires), where Cholesky breaks down, and where the condition estimate is above 1 / (n eps) of float64; the
    factor's `ridge` and `why` say so.

    Raises as `factorize` does; SolveError only where the ridge does not help.
    """
    try:
        factor = factorize(C)
        if factor.condition <= _most_condition(len(C), torch.float64):
            return factor
        why = f"the condition is at least {factor.condition:.1e}"
        del factor  # before the next one comes
    except SolveError as error:
        why = error.what
    ridge = RIDGE * float(C.diagonal().double().mean())
    return replace(factorize(C, ridge=ridge), why=why)


def try_factor(A: Tensor, scale: Tensor, dtype: torch.dtype, ridge: float = 0.0) -> tuple[Factor, int]:
    """The factor, and the row where Cholesky first broke down (0: nowhere)."""
    scaled = torch.empty(A.shape, dtype=dtype, device=A.device)
    for rows in blocks(A.shape[-1]):
        scaled[..., rows, :] = (scale[..., rows, :] * A[..., rows, :].double()).mul_(scale.mT)
    if ridge:
        scaled.diagonal(dim1=-2, dim2=-1).add_(ridge * scale[..., 0] ** 2)
    L, status = torch.linalg.cholesky_ex(scaled)
    del scaled
    pivots = L.diagonal(dim1=-2, dim2=-1).double()
    spread = (pivots.amax(-1) / pivots.amin(-1)) ** 2
    broke = status.flatten().tolist()  # the one wait for the device
    first = next((row for row in broke if row), 0)
    return Factor(L, scale, float(spread.max()), ridge), first


def broken(A: Tensor, row: int, dtype: torch.dtype) -> SolveError:
    n = A.shape[-1]
    what = f"A is not positive definite (Cholesky broke down at row {row} of {n})"
    return SolveError(what, torch.nan, _most_condition(n, dtype))


def _most_condition(n: int, dtype: torch.dtype) -> float:
    """Cholesky ends well if the smallest eigenvalue is above about n eps; the largest is at least 1, the diagonal."""
    return 1 / (n * torch.finfo(dtype).eps)


def checked_scale(A: Tensor, ridge: float = 0.0) -> Tensor:
    """diag(A + ridge I)^-1/2 as ``[..., n, 1] fp64``, once all that can be known before factoring is checked."""
    check_matrix(A)
    diagonal = A.diagonal(dim1=-2, dim2=-1).double() + ridge
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
