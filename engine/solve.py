"""Which system a method solves. Factorisations are in `kernels.spd_solve`."""

import torch
from torch import Tensor, nn

from ..kernels.spd_solve import SolveInfo, spd_solve
from .delta import Factors

GAIN_FLOOR = 1e-4  # of the mean squared gain: coordinates that a norm mutes are not chased


def memit_update(K: Tensor, R: Tensor, C: Tensor, weight: float) -> tuple[Factors, SolveInfo]:
    """MEMIT's closed form: Delta = Rᵀ Xᵀ with (weight C + Kᵀ K) X = Kᵀ (arXiv 2210.07229, eq. 14).

    K: [n, d_in] keys; R: [n, d_out] residuals; C: [d_in, d_in] mean of k kᵀ; weight: lambda
    Returns (float32 factors: left [d_out, n], right [n, d_in]; how the solve went).
    Raises `SolveError` where the system cannot be solved to a relative residual of 1e-6.
    """
    K = K.double()
    system = C.to(K.device, torch.float64, copy=True).mul_(weight)
    system.addmm_(K.T, K)
    X, info = spd_solve(system, K.T)
    return Factors(R.T.float().contiguous(), X.T.float().contiguous()), info


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
