"""Which system a method solves. Factorisations are in `kernels.spd_solve`."""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..kernels.spd_solve import (
    TOLERANCE,
    Factor,
    KeySystem,
    NullSpace,
    SolveError,
    SolveInfo,
    push_through,
    regular_factor,
    spd_solve,
    with_history,
    woodbury,
)
from .delta import Factors

log = logging.getLogger(__name__)

GAIN_FLOOR = 1e-4  # of the mean squared gain: coordinates that a norm mutes are not chased


def memit_update(
    K: Tensor, R: Tensor, C: Tensor, weight: float, factor: Callable[[], Factor] | None = None
) -> tuple[Factors, SolveInfo]:
    """MEMIT's closed form: Delta = Rᵀ Xᵀ with (weight C + Kᵀ K) X = Kᵀ (arXiv 2210.07229, eq. 14).

    K: [n, d_in] keys; R: [n, d_out] residuals; C: [d_in, d_in] mean of k kᵀ; weight: lambda; at 0 the keys map to
        their residuals exactly, by the least update in C's metric, and must be independent
    factor: gives the `regular_factor` of C, on K's device. Where C has no full rank, so that the factor has a ridge,
        C + ridge I stands for C, however many keys there are
    Returns (float32 factors: left [d_out, n], right [n, d_in]; how the solve went, with the ridge).
    Raises `SolveError` where the system cannot be solved to a relative residual of 1e-6.
    """
    C = C.to(K.device)
    known = None
    try:
        known = factor() if factor else regular_factor(C)
        if 4 * len(K) < len(C) or not weight:  # Woodbury's form is cheaper
            Xt, info = woodbury(known, C, K, weight)
            return _factors(R, Xt), info
    except SolveError as error:  # C alone is harder than with the keys added to it
        if not weight:
            raise
        log.info("solved as one dense system: %s", error)
    ridge, known = known.ridge if known else 0.0, None  # the dense system needs the room
    K = K.double()
    system = C.to(torch.float64, copy=True).mul_(weight)
    if ridge:
        system.diagonal().add_(weight * ridge)
    system.addmm_(K.T, K)
    X, info = spd_solve(system, K.T)
    return _factors(R, X.T), replace(info, ridge=ridge)


def alphaedit_update(K: Tensor, R: Tensor, space: NullSpace, before: KeySystem) -> tuple[Factors, KeySystem, SolveInfo]:
    """AlphaEdit's closed form: Delta = Rᵀ Xᵀ with (P (Kᵀ K + K_pᵀ K_p) + L2 I) X = P Kᵀ (arXiv 2410.02355, eq. 13).

    K: [n, d_in] keys; R: [n, d_out] residuals; space: P; before: the earlier keys K_p and L2
    Returns (float32 factors as of `memit_update`; the system with these keys in it; how the solve went).
    """
    Xt, system, info = push_through(space, K, before)
    return _factors(R, Xt), system, info


def memit_history_update(
    K: Tensor, R: Tensor, C: Tensor, factor: Factor, before: KeySystem
) -> tuple[Factors, KeySystem, SolveInfo]:
    """MEMIT's closed form beside all earlier keys K_p: Delta = Rᵀ Xᵀ with (lambda C + K_pᵀ K_p + Kᵀ K) X = Kᵀ (OTE-SE).

    K: [n, d_in] keys; R: [n, d_out] residuals; C: [d_in, d_in]; factor: the `regular_factor` of C, on K's device
    before: the earlier keys, and lambda
    Returns (float32 factors as of `memit_update`; the system with these keys in it; how the solve went).
    """
    Xt, system, info = with_history(factor, C.to(K.device), K, before)
    return _factors(R, Xt), system, info


def inverse_times(K: Tensor, C: Tensor, factor: Callable[[], Factor]) -> tuple[Tensor, SolveInfo]:
    """C⁻¹ k for each key, as ROME's u has it: [n, d_in] float64, and how the solve went.

    K: [n, d_in]; C: [d_in, d_in]; factor: gives the `regular_factor` of C, on K's device
    """
    known, B = factor(), K.double().T
    C = C.to(K.device, torch.float64)
    X = known.solve(B)
    for steps in range(2):
        left = B - C @ X - known.ridge * X
        residual = float(left.norm() / B.norm())
        if residual <= TOLERANCE:
            return X.T, SolveInfo(residual, known.condition, known.dtype, steps, "factor", "full", known.ridge)
        X = X + known.solve(left)
    X, info = spd_solve(C + known.ridge * torch.eye(len(C), dtype=C.dtype, device=C.device), B)
    return X.T, replace(info, ridge=known.ridge)


def _factors(R: Tensor, Xt: Tensor) -> Factors:
    return Factors(R.T.float().contiguous(), Xt.float().contiguous())


def through_norm(norm: nn.Module, x: Tensor, R: Tensor) -> Tensor:
    """What must be added to `x` so that `norm(x)` moves by `R`, to first order.

    For y = g x / rms(x) the Jacobian is diag(g) (I - x xᵀ / |x|²) / rms(x): moving along x changes nothing, so that
    part of R cannot be had. norm: an RMS norm with gain g; x, R: [n, d] float32, what it reads at each token, and the
    asked change of what it gives.
    """
    weight = next(norm.parameters())
    with torch.no_grad():  # g by asking the norm itself: families store it as g or as 1 + weight
        gain = norm(torch.ones(1, x.shape[1], device=weight.device, dtype=weight.dtype)).float().to(x.device)
    u = R * gain / (gain**2 + GAIN_FLOOR * (gain**2).mean())
    along = (u * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return x.pow(2).mean(1, keepdim=True).sqrt() * (u - along * x)
