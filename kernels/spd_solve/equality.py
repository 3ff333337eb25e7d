"""The limit of Woodbury's form for weight 0: keys give exactly what is asked, at the least cost in the metric of C."""

import torch
from torch import Tensor

from .dense import relative_norm, spd_solve
from .factor import Factor
from .info import SolveError, SolveInfo
from .residual import STEPS, combinations, symmetric_product


def constrained(
    factor: Factor, C: Tensor, K: Tensor, Y: Tensor, gram: Tensor, full: bool, tolerance: float
) -> tuple[Tensor, SolveInfo]:
    """X = Y T with T = (K Y)⁻¹, measured and refined as what it is: C X = Kᵀ T with K X = I.

    Y: [..., d, n] fp64, C⁻¹ Kᵀ; gram: [..., n, n], K Y; the rest, what is returned and raised as of `woodbury`
    """
    identity = torch.eye(K.shape[-2], dtype=torch.float64, device=K.device)
    try:
        inverse, inside = spd_solve(gram, identity)
    except SolveError as error:
        raise _dependent(gram, error.what, error.residual, error.condition) from None

    def measure(X: Tensor, T: Tensor) -> tuple[float, Tensor, Tensor]:
        mix = identity if full else combinations(K)
        X, KT = X @ mix, K.mT @ (T @ mix)
        R = KT - symmetric_product(C, X) - factor.ridge * X
        gap = mix - K @ X
        return max(relative_norm(R, KT), relative_norm(gap, mix.expand_as(gap))), R, gap

    X, T, steps = Y @ inverse, inverse, 0
    residual, R, gap = measure(X, T)
    if not residual <= tolerance and not full:
        full = True
        residual, R, gap = measure(X, T)
    while not residual <= tolerance and residual < torch.inf and steps < STEPS:
        step = factor.solve(R)
        of_T = inverse @ (gap - K @ step)
        trial = X + step + Y @ of_T, T + of_T
        after, *rest = measure(*trial)
        if not after < residual:
            break
        (X, T), residual, (R, gap), steps = trial, after, rest, steps + 1
    condition = max(factor.condition, inside.condition)
    if not residual <= tolerance:
        raise _dependent(gram, f"relative residual {residual:.1e}, above {tolerance:.0e}", residual, condition)
    checked = "full" if full else "sampled"
    return X.mT, SolveInfo(residual, condition, factor.dtype, steps, "woodbury", checked, factor.ridge)


def _dependent(gram: Tensor, what: str, residual: float, condition: float) -> SolveError:
    """Names the two keys that are the most alike."""
    n = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    cosine = (scale[..., :, None] * gram * scale[..., None, :]).abs().tril(-1)
    at = int(cosine.argmax()) % (n * n)
    alike = f"; keys {at % n} and {at // n} are the closest, cosine {float(cosine.max()):.9f}" if n > 1 else ""
    return SolveError(
        f"with weight 0 the keys must not depend on each other: {what}{alike}",
        residual,
        condition,
        "Set emmet_lambda > 0, or leave out facts that ask for the same key",
    )
