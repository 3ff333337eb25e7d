"""A X = B by Cholesky: refined where it misses the tolerance, done again in float64, then refused."""

import torch
from torch import Tensor

from ..errors import InputError
from .factor import Factor, blocks, broken, checked_scale, fast_dtype, refuse_nonfinite, try_factor
from .info import TOLERANCE, SolveError, SolveInfo
from .small import MOST, small_factor_solve

_STEPS = 10  # of refinement; where it converges at all, it needs fewer


@torch.no_grad()
def spd_solve(
    A: Tensor, B: Tensor, dtype: torch.dtype | None = None, tolerance: float = TOLERANCE
) -> tuple[Tensor, SolveInfo]:
    """Solve A X = B, for one system or a batch of independent ones (lambdas, layers, small systems).

    A: [..., n, n] fp32 or fp64, symmetric positive definite, both triangles filled (``gram.mirror_``); not changed
    B: [..., n, k] any floating dtype, on A's device; leading dimensions are A's, or can be expanded to them
    dtype: what to factor in; None: float64, on GPUs with slow fp64 float32. float32 is refined by conjugate gradients
        with fp64 residuals and the factor as preconditioner, and done again in float64 where that misses the tolerance
    tolerance: of the relative residual ‖A X - B‖ / ‖B‖ of each system

    Returns ``X: [..., n, k] fp64`` and the SolveInfo of it, the worst of a batch. Up to n = 32 a batch is one call of
    `small_solve`. Memory: two [..., n, n] of ``dtype``, and blocks of rows.

    Raises InputError: shape, dtype or device is not as above, a NaN or infinity in A or B, A not symmetric.
    Raises SolveError (an InputError): A is not positive definite, or the tolerance is missed in float64 too.

    Source: refinement as in Higham, Accuracy and Stability of Numerical Algorithms, ch. 12; conjugate gradients for
    conditions at which its fixed-point form diverges.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(f"spd_solve: dtype={dtype}; expected torch.float32 or torch.float64")
    scale = checked_scale(A)
    n = A.shape[-1]
    if B.ndim < 2 or B.shape[-2] != n or not B.is_floating_point() or B.device != A.device:
        raise InputError(
            f"spd_solve: B is {list(B.shape)} {B.dtype} on {B.device}; expected [{n}, k], floating, on {A.device}"
        )
    try:
        B = B.double().expand(*A.shape[:-2], n, B.shape[-1])
    except RuntimeError:
        expected = f"[{', '.join(map(str, A.shape[:-2]))}, {n}, k]"
        raise InputError(f"spd_solve: B is {list(B.shape)}; expected {expected} for A {list(A.shape)}") from None
    refuse_nonfinite(B, "B")
    for attempt in dict.fromkeys((dtype or fast_dtype(A.device), torch.float64)):
        X, info, broke = _attempt(A, B, scale, attempt, tolerance)
        if info.residual <= tolerance:
            return X, info
    if broke:
        raise broken(A, broke, torch.float64)
    what = f"relative residual {info.residual:.1e} in float64, above {tolerance:.0e}"
    raise SolveError(what, info.residual, info.condition)


def _attempt(
    A: Tensor, B: Tensor, scale: Tensor, dtype: torch.dtype, tolerance: float
) -> tuple[Tensor, SolveInfo, int]:
    """Factor in ``dtype``, solve, refine: X, its SolveInfo, and the row where Cholesky broke down (0: nowhere)."""
    if A.shape[-1] <= MOST and dtype is torch.float64:
        factor, X, broke = small_factor_solve(A, B, scale)
    else:
        factor, broke = try_factor(A, scale, dtype)
        X = B if broke else factor.solve(B)
    if broke:
        return X, SolveInfo(torch.nan, torch.inf, factor.dtype, 0), broke
    X, worst, steps = refine(A, B, X, factor, tolerance)
    return X, SolveInfo(worst, factor.condition, factor.dtype, steps), 0


def refine(A: Tensor, B: Tensor, X: Tensor, factor: Factor, tolerance: float) -> tuple[Tensor, float, int]:
    """Conjugate gradients from X, every column its own, until the residual (the worst system's) is small enough.

    Returns (X, its measured residual, steps).
    """
    R, residual = residual_of(A, B, X)
    if residual <= tolerance or not residual < torch.inf:
        return X, residual, 0
    Z = factor.solve(R)
    P, rz = Z, (R * Z).sum(-2, keepdim=True)
    steps, best = 0, X
    for _ in range(_STEPS):
        AP = product(A, P)
        curvature = (P * AP).sum(-2, keepdim=True)
        alpha = torch.where(curvature > 0, rz / curvature, 0.0)  # a column that is solved stays
        trial = best + alpha * P
        R, after = residual_of(A, B, trial)
        if not after < residual:
            break
        best, residual, steps = trial, after, steps + 1
        if residual <= tolerance:
            break
        Z = factor.solve(R)
        before, rz = rz, (R * Z).sum(-2, keepdim=True)
        P = Z + torch.where(before > 0, rz / before, 0.0) * P
    return best, residual, steps


def product(A: Tensor, X: Tensor) -> Tensor:
    """A X in fp64, whatever A is stored in, without a copy of A."""
    if A.dtype is torch.float64:
        return A @ X
    out = X.new_empty(*A.shape[:-1], X.shape[-1])
    for rows in blocks(A.shape[-2]):
        out[..., rows, :] = A[..., rows, :].double() @ X
    return out


def residual_of(A: Tensor, B: Tensor, X: Tensor) -> tuple[Tensor, float]:
    """B - A X in fp64, and its norm relative to B's, of the worst system."""
    R = B - product(A, X)
    return R, relative_norm(R, B)


def relative_norm(R: Tensor, B: Tensor) -> float:
    """‖R‖ / ‖B‖ (Frobenius) of the worst system; 0 where B is 0 and R too."""
    norm, asked = torch.linalg.matrix_norm(R), torch.linalg.matrix_norm(B)
    return float(torch.where(norm == 0, norm, norm / asked).max()) if R.numel() else 0.0
