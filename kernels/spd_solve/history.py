"""MEMIT with history: new keys beside all earlier ones of a session, in the metric of C."""

import torch
from torch import Tensor

from ..errors import InputError
from .dense import product, relative_norm
from .factor import Factor, refuse_nonfinite
from .info import TOLERANCE, SolveError, SolveInfo
from .key_system import KeySystem
from .residual import STEPS, combinations, symmetric_product


@torch.no_grad()
def with_history(
    factor: Factor, C: Tensor, K: Tensor, before: KeySystem, *, full: bool = False, tolerance: float = TOLERANCE
) -> tuple[Tensor, KeySystem, SolveInfo]:
    """Solve (weight C + K_pᵀ K_p + Kᵀ K) X = Kᵀ on a kept factor of C.

    factor: of C, ``factorize(C)``, of one matrix, the same for all of a session's batches; where it has a ridge,
        C + ridge I stands for C throughout
    C: [d, d] fp32 or fp64, for the residual
    K: [n, d] any floating dtype, new keys, one a row
    before: the earlier keys K_p, whitened, and the weight (MEMIT's lambda) as its ridge: at first
        ``KeySystem.empty(d, weight, device)``, then what the last call returned
    full: measure the residual of every column; else of 8 random combinations of them (and of every column where those
        miss the tolerance)

    Returns ``Xᵀ: [n, d]`` fp64, the system with the new keys in it (drop it if this batch is not kept), and the
    SolveInfo. With C = G Gᵀ, a key is whitened to G⁻¹ k, and X = G⁻ᵀ (weight I + Σ k kᵀ)⁻¹ of the new ones. Earlier
    keys enter the residual as they can be had back from the whitened ones.

    An update by the residual targets that the weights W then miss, (V - W Kᵀ) Xᵀ with V: [d_out, n], leaves what one
    solve with the keys of all batches gives, whatever their order: it is a recursive least squares.

    Raises InputError: shapes or devices do not fit, NaN or infinity in K.
    Raises SolveError (an InputError): the residual misses the tolerance after refinement.

    Source: OTE-SE (Labyrinth and Thread, arXiv 2605.26670), the history-aware form of MEMIT (arXiv 2210.07229, eq. 14).
    """
    d = before.X.shape[1]
    if not C.shape == factor.L.shape == (d, d) or K.ndim != 2 or K.shape[1] != d or not K.is_floating_point():
        raise InputError(
            f"with_history: C is {list(C.shape)}, its factor {list(factor.L.shape)}, K {list(K.shape)} {K.dtype}; "
            f"expected [{d}, {d}], the same, and [n, {d}], floating, for earlier keys of width {d}"
        )
    if not C.device == K.device == before.X.device == factor.L.device:
        raise InputError(
            f"with_history: K is on {K.device}, C on {C.device}, its factor on {factor.L.device}, "
            f"earlier keys on {before.X.device}"
        )
    refuse_nonfinite(K, "K")
    K, weight = K.double(), before.ridge
    system = before.append(factor.half_solve(K.T).T.double())
    newest, condition = system.newest(len(K))
    X = factor.other_half(newest.T.to(factor.L.dtype))

    def missing(X: Tensor) -> tuple[float, Tensor]:
        """The relative residual and Kᵀ - A X, or that of random combinations of the columns."""
        B = K.T
        if not full:
            mix = combinations(K)
            B, X = B @ mix, X @ mix
        # earlier keys are X_p Gᵀ with G = S⁻¹ L
        whitened = before.X.T @ (before.X @ product(factor.L.T, X / factor.scale))
        R = B - weight * (symmetric_product(C, X) + factor.ridge * X)
        R -= K.T @ (K @ X) + product(factor.L, whitened) / factor.scale
        return relative_norm(R, B), R

    residual, R = missing(X)
    if not residual <= tolerance and not full:
        full = True
        residual, R = missing(X)
    steps = 0
    while not residual <= tolerance and residual < torch.inf and steps < STEPS:
        step = system.solve(factor.half_solve(R).double())
        trial = X + factor.other_half(step.to(factor.L.dtype))
        after, rest = missing(trial)
        if not after < residual:
            break
        X, residual, R, steps = trial, after, rest, steps + 1
    condition = max(factor.condition, condition)
    if not residual <= tolerance:
        raise SolveError(
            f"the form with history: relative residual {residual:.1e}, above {tolerance:.0e}", residual, condition
        )
    checked = "full" if full else "sampled"
    return X.T, system, SolveInfo(residual, condition, factor.dtype, steps, "history", checked, factor.ridge)
