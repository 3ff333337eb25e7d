"""All keys of a session as one growing system, in the number of keys or of dimensions, whichever is smaller."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .dense import spd_solve
from .info import SolveError


@dataclass(frozen=True, eq=False)
class KeySystem:
    """ridge I + Xᵀ X of all keys so far: below d keys as the factor of ridge I + X Xᵀ, which grows by blocks.

    X: [N, d] fp64, one key a row, in the space of the form that asks: projected (`push_through`), or whitened
        (`with_history`)
    L: [N, N] fp64, lower, the Cholesky factor of X Xᵀ + ridge I while N < d; afterwards [0, 0]
    S: [d, d] fp64, Xᵀ X + ridge I from N = d on; before that None

    So memory beside X ends at one [d, d], and a batch costs d³/3 + d² n at most.
    """

    X: Tensor
    L: Tensor
    ridge: float
    S: Tensor | None = None

    @classmethod
    def empty(cls, d: int, ridge: float, device: torch.device | str = "cpu") -> "KeySystem":
        """No keys yet. ridge > 0: AlphaEdit's L2, MEMIT's lambda."""
        if not ridge > 0:
            raise InputError(f"the ridge (L2, mom2_update_weight) is {ridge}; expected a positive number")
        empty = torch.zeros(0, d, dtype=torch.float64, device=device)
        return cls(empty, empty @ empty.T, float(ridge))

    def append(self, X: Tensor) -> "KeySystem":
        """With the keys ``X: [n, d] fp64`` behind those so far. Raises SolveError where it breaks down."""
        every = torch.cat([self.X, X])
        if self.S is not None:
            return self._wide(every, torch.addmm(self.S, X.T, X))
        if len(every) >= X.shape[1]:
            return self._wide(every, self._sum(every))
        corner = X @ X.T
        corner.diagonal().add_(self.ridge)
        return KeySystem(every, append_cholesky(self.L, X @ self.X.T, corner), self.ridge)

    def without_last(self, n: int) -> "KeySystem":
        """As before the last n keys came, X bit for bit.

        So is L where there were fewer than d keys all the time: a leading block of the factor is the factor of the
        leading block. From N >= d back S or L is what it was to rounding, eps of the larger S.
        """
        N = len(self.X) - n
        X, gone = self.X[:N], self.X[N:]
        if self.S is None:
            return KeySystem(X, self.L[:N, :N], self.ridge)
        if X.shape[1] > N:
            return KeySystem(X[:0], self.L, self.ridge).append(X)
        # whichever reads fewer keys
        return self._wide(X, torch.addmm(self.S, gone.T, gone, alpha=-1) if n < N else self._sum(X))

    def newest(self, n: int) -> tuple[Tensor, float]:
        """((ridge I + Xᵀ X)⁻¹ x for each of the last n keys x, [n, d] fp64; a lower bound of the condition)."""
        N, L = len(self.X) - n, self.L
        if self.S is not None:
            found, info = spd_solve(self.S, self.X[N:].T, torch.float64)
            return found.T, info.condition
        # Xᵀ (X Xᵀ + ridge I)⁻¹ of the last n unit vectors: their forward solution ends in the inverse of the last block
        last = torch.linalg.solve_triangular(L[N:, N:], torch.eye(n, dtype=L.dtype, device=L.device), upper=False)
        T = torch.linalg.solve_triangular(L.mT, torch.cat([L.new_zeros(N, n), last]), upper=True)
        pivots = L.diagonal()
        return T.T @ self.X, float((pivots.max() / pivots.min()) ** 2) if len(L) else 1.0

    def solve(self, V: Tensor) -> Tensor:
        """(ridge I + Xᵀ X)⁻¹ V for any ``V: [d, k] fp64``; of keys `newest` is more exact."""
        if self.S is not None:
            return spd_solve(self.S, V, torch.float64)[0]
        return (V - self.X.T @ torch.cholesky_solve(self.X @ V, self.L)) / self.ridge

    def _sum(self, X: Tensor) -> Tensor:
        S = X.T @ X
        S.diagonal().add_(self.ridge)
        return S

    def _wide(self, X: Tensor, S: Tensor) -> "KeySystem":
        return KeySystem(X, S.new_zeros(0, 0), self.ridge, S)


@torch.no_grad()
def append_cholesky(L: Tensor, cross: Tensor, corner: Tensor) -> Tensor:
    """The factor of [[A, crossᵀ], [cross, corner]] from L, that of A: N² n instead of (N + n)³ / 3.

    L: [N, N] fp64, lower; cross: [n, N] fp64; corner: [n, n] fp64, symmetric; N = 0 starts one

    Raises SolveError: the whole is not positive definite.
    Source: Golub and Van Loan, Matrix Computations, 4.2.9 (block Cholesky).
    """
    N, n = len(L), len(corner)
    grown = torch.zeros(N + n, N + n, dtype=L.dtype, device=L.device)
    side = torch.linalg.solve_triangular(L, cross.T, upper=False).T
    block, status = torch.linalg.cholesky_ex(corner - side @ side.T)
    broke = int(status)
    if broke:
        what = f"the system that keys are added to is not positive definite (Cholesky broke down at row {N + broke})"
        raise SolveError(what, torch.nan, 1 / ((N + n) * torch.finfo(L.dtype).eps))
    grown[:N, :N], grown[N:, :N], grown[N:, N:] = L, side, block
    return grown
