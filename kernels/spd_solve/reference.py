"""The specification of the solves: obvious torch, dense systems by LU in float64."""

import torch
from torch import Tensor


def solve(A: Tensor, B: Tensor) -> Tensor:
    """``A⁻¹ B``: ``A: [..., n, n]``, ``B: [..., n, k]``."""
    return torch.linalg.solve(A.double(), B.double())


def memit(C: Tensor, K: Tensor, weight: float) -> Tensor:
    """``((weight C + Kᵀ K)⁻¹ Kᵀ)ᵀ: [n, d]`` of ``C: [d, d]``, ``K: [n, d]``, as published."""
    K = K.double()
    return solve(weight * C.double() + K.T @ K, K.T).T


def history(C: Tensor, K: Tensor, earlier: Tensor, weight: float) -> Tensor:
    """``((weight C + earlierᵀ earlier + Kᵀ K)⁻¹ Kᵀ)ᵀ: [n, d]``: MEMIT beside all earlier keys."""
    K, earlier = K.double(), earlier.double()
    return solve(weight * C.double() + earlier.T @ earlier + K.T @ K, K.T).T


def emmet(C: Tensor, K: Tensor, weight: float) -> Tensor:
    """``(C⁻¹ Kᵀ (K C⁻¹ Kᵀ + weight I)⁻¹)ᵀ: [n, d]``, as published; weight 0: K times it, transposed, is I."""
    K = K.double()
    Y = solve(C.double(), K.T)
    inner = K @ Y
    inner.diagonal().add_(weight)
    return solve(inner, Y.T)


def alphaedit(P: Tensor, K: Tensor, earlier: Tensor, ridge: float) -> Tensor:
    """``((P (Kᵀ K + earlierᵀ earlier) + ridge I)⁻¹ P Kᵀ)ᵀ: [n, d]``, as published; the matrix is not symmetric."""
    P, K, earlier = P.double(), K.double(), earlier.double()
    system = P @ (K.T @ K + earlier.T @ earlier)
    system.diagonal().add_(ridge)
    return solve(system, P @ K.T).T


def rls(Q: Tensor, K: Tensor) -> Tensor:
    """``(Q⁻¹ + Kᵀ K)⁻¹``."""
    Q, K = Q.double(), K.double()
    return torch.linalg.inv(torch.linalg.inv(Q) + K.T @ K)
