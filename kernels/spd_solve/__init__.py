"""A X = B for symmetric positive-definite A: Jacobi scaling, Cholesky, refinement, the residual always measured."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import InputError

TOLERANCE = 1e-6
_BLOCK = 512  # rows of A in fp64 at a time: 64 MiB at n = 16384
_STEPS = 10  # of refinement; where it converges at all, it needs fewer
_ASYMMETRY = 1e-3  # of sqrt(a_ii a_jj): sums in any order stay far below, an unmirrored triangle far above


@dataclass(frozen=True)
class SolveInfo:
    """How a solve went: goes into the report.

    residual: ‖A X - B‖ / ‖B‖ (Frobenius, measured in fp64 on the X that is returned; 0 if B is 0)
    condition: lower bound of the scaled matrix's 2-norm condition: (max diag L / min diag L)², L its Cholesky factor
    dtype: "float64" or "float32": what the factor was computed in
    refinements: steps of iterative refinement taken with that factor
    """

    residual: float
    condition: float
    dtype: str
    refinements: int


class SolveError(InputError):
    """The system cannot be solved to the tolerance: collect more tokens, or raise lambda or the ridge.

    residual: of the best X found; NaN where none came about
    condition: as in SolveInfo; where Cholesky broke down 1 / (n eps), which is about the least that makes it break
    """

    def __init__(self, what: str, residual: float, condition: float) -> None:
        super().__init__(
            f"spd_solve: {what}; condition of the Jacobi-scaled matrix at least {condition:.1e}. "
            "Collect statistics over more tokens (at least 2 per dimension), "
            "or raise lambda (mom2_update_weight) or the ridge (L2)"
        )
        self.residual = residual
        self.condition = condition


@torch.no_grad()
def spd_solve(
    A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype = torch.float64, tolerance: float = TOLERANCE
) -> tuple[torch.Tensor, SolveInfo]:
    """Solve A X = B.

    A: [n, n] fp32 or fp64, symmetric positive definite, both triangles filled (``gram.mirror_``); not changed
    B: [n, k] any floating dtype, on A's device
    dtype: what to factor in. float32 is for cards whose fp64 is slow: it is refined with fp64 residuals, and done again
        in float64 if that does not reach the tolerance
    tolerance: of the relative residual ‖A X - B‖ / ‖B‖

    Returns ``X: [n, k] fp64`` and the SolveInfo of it. Memory: two [n, n] of ``dtype``, and blocks of rows.

    Raises InputError: shape, dtype or device is not as above, a NaN or infinity in A or B, A not symmetric.
    Raises SolveError (an InputError): A is not positive definite, or the tolerance is missed in float64 too.

    Source: Jacobi scaling is within a factor n of the best diagonal scaling (van der Sluis 1969); fixed-precision
    refinement as in Higham, Accuracy and Stability of Numerical Algorithms, ch. 12.
    """
    scale = _checked_scale(A, B, dtype)
    B = B.double()
    if dtype is torch.float32:
        X, info, _ = _attempt(A, B, scale, dtype, tolerance)
        if info.residual <= tolerance:
            return X, info
    X, info, broke = _attempt(A, B, scale, torch.float64, tolerance)
    if broke:
        what = f"A is not positive definite (Cholesky broke down at row {broke} of {len(A)})"
        raise SolveError(what, info.residual, info.condition)
    if not info.residual <= tolerance:  # NaN too
        what = f"relative residual {info.residual:.1e} in float64, above {tolerance:.0e}"
        raise SolveError(what, info.residual, info.condition)
    return X, info


def _attempt(
    A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, tolerance: float
) -> tuple[torch.Tensor, SolveInfo, int]:
    """Factor in ``dtype``, solve, refine: X, its SolveInfo, and the row where Cholesky broke down (0: nowhere)."""
    name = str(dtype).removeprefix("torch.")
    scaled = torch.empty(A.shape, dtype=dtype, device=A.device)
    for rows in _blocks(len(A)):
        scaled[rows] = scale[rows] * A[rows].double() * scale.T
    L, status = torch.linalg.cholesky_ex(scaled)
    del scaled
    broke = int(status)
    if broke:
        # Cholesky ends well if the smallest eigenvalue is above about n eps; the largest is at least 1, the diagonal
        condition = 1 / (len(A) * torch.finfo(dtype).eps)
        return torch.full_like(B, torch.nan), SolveInfo(torch.nan, condition, name, 0), broke
    pivots = L.diagonal().double()
    condition = float((pivots.max() / pivots.min()) ** 2)

    def correction(rhs: torch.Tensor) -> torch.Tensor:
        y = torch.linalg.solve_triangular(L, (scale * rhs).to(dtype), upper=False)
        return scale * torch.linalg.solve_triangular(L.mT, y, upper=True).double()

    X = correction(B)
    R, residual = _residual(A, B, X)
    steps = 0
    while not residual <= tolerance and steps < _STEPS:
        trial = X + correction(R)
        R, after = _residual(A, B, trial)
        if not after < residual:
            break
        X, residual, steps = trial, after, steps + 1
    return X, SolveInfo(residual, condition, name, steps), 0


def _residual(A: torch.Tensor, B: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, float]:
    """B - A X in fp64, and its norm relative to B's."""
    R = torch.empty_like(B)
    for rows in _blocks(len(A)):
        R[rows] = B[rows] - A[rows].double() @ X
    norm = float(torch.linalg.norm(B))
    return R, float(torch.linalg.norm(R)) / norm if norm else 0.0


def _checked_scale(A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """diag(A)^-1/2 as ``[n, 1] fp64``, once everything that can be known before factoring has been checked."""
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"spd_solve: dtype={dtype}; expected torch.float32 or torch.float64")
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not len(A) or A.dtype not in (torch.float32, torch.float64):
        raise InputError(f"spd_solve: A is {list(A.shape)} {A.dtype}; expected [n, n] in float32 or float64")
    if B.ndim != 2 or len(B) != len(A) or not B.is_floating_point() or B.device != A.device:
        raise InputError(
            f"spd_solve: B is {list(B.shape)} {B.dtype} on {B.device}; expected [{len(A)}, k], floating, on {A.device}"
        )
    for name, matrix in (("A", A), ("B", B)):
        if not all(bool(matrix[rows].isfinite().all()) for rows in _blocks(len(matrix))):
            raise InputError(f"spd_solve: {name} holds NaN or infinity")
    diagonal = A.diagonal().double()
    dead = (diagonal <= 0).nonzero().flatten().tolist()
    if dead:
        what = f"{len(dead)} of {len(A)} diagonal elements are not positive, the first in row {dead[0]}"
        raise SolveError(f"A is not positive definite: {what}", torch.nan, torch.inf)
    scale = diagonal.rsqrt()[:, None]
    for rows in _blocks(len(A)):
        skew = (A[rows].double() - A[:, rows].T.double()).abs_().mul_(scale[rows]).mul_(scale.T)
        if float(skew.max()) > _ASYMMETRY:
            raise InputError("spd_solve: A is not symmetric; was only one triangle filled (gram.mirror_)?")
    return scale


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, n, _BLOCK))
