"""Closed forms in the number of keys: MEMIT's system on a kept factor of C, and the recursive least squares step."""

import torch
from torch import Tensor

from ..errors import InputError
from ..gram import mirror_
from .dense import relative_norm, spd_solve
from .equality import constrained
from .factor import Factor, refuse_nonfinite
from .info import TOLERANCE, SolveError, SolveInfo
from .residual import STEPS, combinations, symmetric_product


@torch.no_grad()
def woodbury(
    factor: Factor, C: Tensor, K: Tensor, weight: Tensor | float, *, full: bool = False, tolerance: float = TOLERANCE
) -> tuple[Tensor, SolveInfo]:
    """Solve (weight C + Kᵀ K) X = Kᵀ on a kept factor of C, for one weight or a grid of them, or under K X = I.

    factor: of C, ``factorize(C)``; where it has a ridge, C + ridge I stands for C throughout
    C: [..., d, d] fp32 or fp64, for the residual; leading dimensions are layers
    K: [..., n, d] any floating dtype, keys, one a row
    weight: lambda > 0: a number, or [g] fp64: a grid, solved for together. The number 0 is the limit: the X with
        K X = I that is least in the metric of C, ``C⁻¹ Kᵀ (K C⁻¹ Kᵀ)⁻¹``; the keys must be independent
    full: measure the residual of every column; else of 8 random combinations of them (and of every column where those
        miss the tolerance), which costs 8 / n as much

    Returns ``Xᵀ: [..., n, d]``, with a grid ``[g, ..., n, d]``, fp64, and the SolveInfo (the worst). With
    ``Y = C⁻¹ Kᵀ``: ``X = Y (weight I + K Y)⁻¹``: two triangular solves with n right-hand sides instead of a
    factorisation; cheaper than that where n < d / 4. With weight 0 the residual is the larger one of
    ‖C X - Kᵀ T‖ / ‖Kᵀ T‖ and ‖K X - I‖ / ‖I‖, T the inverse of K C⁻¹ Kᵀ.

    Raises InputError: shapes or devices do not fit, weight is negative, NaN or infinity in K.
    Raises SolveError (an InputError): the residual misses the tolerance after refinement, where the dense system
    (`spd_solve`) may still do better; with weight 0 also equal or dependent keys.

    Source: Woodbury 1950; Hager, Updating the inverse of a matrix, SIAM Review 31 (1989); weight 0: EMMET
    (arXiv 2403.14236), its closed form.
    """
    d = C.shape[-1]
    if C.shape != factor.L.shape or K.ndim < 2 or K.shape[-1] != d or K.shape[:-2] != C.shape[:-2]:
        raise InputError(
            f"woodbury: C is {list(C.shape)}, its factor {list(factor.L.shape)}, K {list(K.shape)}; "
            "expected [..., d, d], the same, and [..., n, d]"
        )
    if K.device != factor.L.device or not K.is_floating_point():
        raise InputError(f"woodbury: K is {K.dtype} on {K.device}; expected floating, on {factor.L.device}")
    weights = torch.as_tensor(weight, dtype=torch.float64, device=K.device)
    equality = weights.ndim == 0 and bool(weights == 0)
    if weights.ndim > 1 or not (equality or bool((weights > 0).all())):
        raise InputError(f"woodbury: weight is {weight}; expected a positive number, [g] of them, or the number 0")
    _refuse_keys("woodbury", K)
    K = K.double()
    V = factor.half_solve(K.mT)
    Y = factor.other_half(V)
    gram = V.double().mT @ V.double()  # K C⁻¹ Kᵀ
    lambdas = weights.reshape(-1, *[1] * C.ndim)
    if equality:
        return constrained(factor, C, K, Y, gram, full, tolerance)
    identity = torch.eye(K.shape[-2], dtype=torch.float64, device=K.device)
    inner = gram + lambdas * identity  # [g, ..., n, n]
    # its inverse is small: one product with it instead of two triangular solves with d right-hand sides
    T, inside = spd_solve(inner, identity)
    Xt = T @ Y.mT
    steps = 0
    ridge = factor.ridge
    residual, R = _residual(C, K, Xt, lambdas, full, ridge)
    if not residual <= tolerance and not full:
        full = True
        residual, R = _residual(C, K, Xt, lambdas, full, ridge)
    while not residual <= tolerance and residual < torch.inf and steps < STEPS:
        # (λC + KᵀK)⁻¹ R = (C⁻¹ R - Y (λI + K Y)⁻¹ Yᵀ R) / λ
        step = factor.solve(R)
        step = (step - (Xt.mT @ (K @ step))) / lambdas
        trial = Xt + step.mT
        after, rest = _residual(C, K, trial, lambdas, full, ridge)
        if not after < residual:
            break
        Xt, residual, R, steps = trial, after, rest, steps + 1
    condition = max(factor.condition, inside.condition)
    if not residual <= tolerance:
        raise SolveError(
            f"Woodbury's form: relative residual {residual:.1e}, above {tolerance:.0e}", residual, condition
        )
    checked = "full" if full else "sampled"
    info = SolveInfo(residual, condition, factor.dtype, steps, "woodbury", checked, ridge)
    return (Xt if weights.ndim else Xt[0]), info


def _residual(
    C: Tensor, K: Tensor, Xt: Tensor, lambdas: Tensor, full: bool, ridge: float = 0.0
) -> tuple[float, Tensor]:
    """(‖B - A X‖ / ‖B‖ of the worst system, B - A X) with B = Kᵀ, or of random combinations of its columns."""
    B, X = K.mT, Xt.mT
    if not full:
        mix = combinations(K)
        B, X = B @ mix, X @ mix
    CX = symmetric_product(C, X)
    if ridge:
        CX = CX + ridge * X
    R = B - lambdas * CX - K.mT @ (K @ X)
    return relative_norm(R, B.expand_as(R)), R


@torch.no_grad()
def rls_step_(Q: Tensor, K: Tensor) -> tuple[Tensor, SolveInfo]:
    """One step of recursive least squares with n new keys: Q becomes ``(Q⁻¹ + Kᵀ K)⁻¹``, in place.

    Q: [d, d] fp64 or fp32, symmetric positive definite: the inverse of what was seen so far, at first I / lambda
    K: [n, d] any floating dtype, keys, one a row

    Returns the gain ``Q Kᵀ`` with the new Q, transposed, ``[n, d]`` in Q's dtype, and the SolveInfo of its n by n
    system. Q stays exactly symmetric. The step is fp64 (two [d, d] of it in memory) and rounded once, to Q's dtype; an
    inverse in fp32 drifts by that rounding: refresh it now and then.

    Raises InputError: shapes, dtypes or devices do not fit, no key, NaN or infinity in K.
    Raises SolveError (an InputError): Q would lose its positive diagonal; it is as it was then.
    Source: Woodbury 1950; Haykin, Adaptive Filter Theory, ch. 10, for n keys at once.
    """
    if Q.ndim != 2 or Q.shape[0] != Q.shape[1] or Q.dtype not in (torch.float32, torch.float64):
        raise InputError(f"rls_step_: Q is {list(Q.shape)} {Q.dtype}; expected [d, d] in float32 or float64")
    if K.ndim != 2 or K.shape[1] != len(Q) or not K.is_floating_point() or K.device != Q.device:
        raise InputError(
            f"rls_step_: K is {list(K.shape)} {K.dtype} on {K.device}; expected [n, {len(Q)}], floating, on {Q.device}"
        )
    _refuse_keys("rls_step_", K)
    K, old = K.double(), Q.double()
    U = K @ old
    inner = U @ K.T
    inner = (inner + inner.T) / 2
    inner.diagonal().add_(1)
    gain, info = spd_solve(inner, U)
    new = torch.addmm(old, U.T, gain, alpha=-1)
    if not bool((new.diagonal() > 0).all()):
        raise SolveError(
            "the new inverse is not positive: these keys pass its precision", info.residual, info.condition
        )
    Q.copy_(new)
    mirror_(Q)
    return gain.to(Q.dtype), info


def _refuse_keys(what: str, K: Tensor) -> None:
    refuse_nonfinite(K, "K")
    if not K.shape[-2]:
        raise InputError(f"{what}: K is {list(K.shape)}; expected at least one key")
