"""The null space of C, and AlphaEdit's update in it, in the number of keys instead of the number of dimensions."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .dense import relative_norm
from .factor import check_matrix, refuse_asymmetric, refuse_nonfinite
from .info import TOLERANCE, SolveError, SolveInfo
from .key_system import KeySystem
from .residual import combinations


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The orthogonal projection P onto the directions that C hardly uses, as a basis and never as [d, d].

    basis: [d, r] fp64, orthonormal columns (each contiguous): of the null space or its complement, whichever is smaller
    complement: P = I - basis basisᵀ instead of basis basisᵀ
    rank: of P
    below, above: the eigenvalues of C on both sides of the threshold; a threshold between far ones is a safe one
    """

    basis: Tensor
    complement: bool
    rank: int
    below: float
    above: float

    def project(self, X: Tensor) -> Tensor:
        """P applied to the rows of ``X: [n, d]``: [n, d] fp64."""
        X = X.double()
        part = (X @ self.basis) @ self.basis.T
        return X - part if self.complement else part

    def to(self, device: torch.device) -> "NullSpace":
        return replace(self, basis=self.basis.to(device))

    def dense(self) -> Tensor:
        """P: [d, d] fp64."""
        return self.project(torch.eye(len(self.basis), dtype=torch.float64, device=self.basis.device))


class Rows(Protocol):
    """A tensor, or whatever else gives its rows by slice, such as a file."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """The spectrum of a symmetric matrix, from which the null space of any threshold is a run of rows.

    values: [d] fp64, ascending
    vectors: [d, d] fp64, orthonormal rows: row i belongs to value i
    """

    values: Tensor
    vectors: Rows

    def null_space(self, threshold: float) -> NullSpace:
        """What has an eigenvalue below ``threshold`` (absolute, as published); only the smaller side is read.

        Raises InputError: the threshold leaves nothing on one of its sides.
        Source: AlphaEdit (Fang et al. 2025, arXiv 2410.02355), eq. 7: P = U Uᵀ.
        """
        values, d = self.values, len(self.values)
        rank = int((values < threshold).sum())
        if not 0 < rank < d:
            raise InputError(
                f"null_space: {rank} of {d} eigenvalues are below the threshold {threshold:g} (nullspace_threshold); "
                f"they go from {float(values[0]):.1e} to {float(values[-1]):.1e}: choose one between"
            )
        complement = 2 * rank > d
        kept = self.vectors[slice(rank, d) if complement else slice(0, rank)].clone()  # frees the others, or the file
        return NullSpace(kept.T, complement, rank, float(values[rank - 1]), float(values[rank]))


@torch.no_grad()
def eigenbasis(C: Tensor) -> Eigenbasis:
    """All eigenvalues and eigenvectors of C.

    C: [d, d] fp32 or fp64, symmetric, the mean of k kᵀ
    Memory: C in fp64, the vectors, and what LAPACK needs (some 2 d² more).

    Raises InputError: C is not symmetric or not finite.
    """
    check_matrix(C)
    # a coordinate that never fires has a zero row: as null as can be
    refuse_asymmetric(C, C.diagonal().double().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()[:, None])
    values, vectors = torch.linalg.eigh(C.double())
    return Eigenbasis(values, vectors.T.contiguous())  # LAPACK has them by columns: no copy


def null_space(C: Tensor, threshold: float) -> NullSpace:
    """Eigenvectors of C with an eigenvalue below ``threshold``: `eigenbasis` and its `null_space` at once."""
    return eigenbasis(C).null_space(threshold)


@torch.no_grad()
def push_through(
    space: NullSpace, K: Tensor, before: KeySystem, *, full: bool = False, tolerance: float = TOLERANCE
) -> tuple[Tensor, KeySystem, SolveInfo]:
    """Solve (P (Kᵀ K + K_pᵀ K_p) + ridge I) X = P Kᵀ without a d by d system.

    space: P; K: [n, d] any floating dtype, new keys, one a row
    before: the earlier keys K_p, projected, their system, and the ridge (AlphaEdit's L2)
    full: measure the residual of every column; else of 8 random combinations of them

    Returns ``Xᵀ: [n, d]`` fp64, the system with the new keys in it (hand it in as ``before`` for the next batch; drop
    it if this one is not kept), and the SolveInfo. With all keys projected, ``X_all = P [K_p, K]ᵀ``, the columns of
    ``X_all (X_allᵀ X_all + ridge I)⁻¹`` that belong to the new keys are the solution, exactly (`KeySystem.newest`).

    Raises InputError: shapes or devices do not fit, NaN or infinity in K.
    Raises SolveError (an InputError): the residual misses the tolerance.

    Source: AlphaEdit (arXiv 2410.02355), eq. 13, by the push-through identity (I + A B)⁻¹ A = A (I + B A)⁻¹.
    """
    d = before.X.shape[1]
    if K.ndim != 2 or K.shape[1] != d or len(space.basis) != d or not K.is_floating_point():
        raise InputError(
            f"push_through: K is {list(K.shape)} {K.dtype}, P of width {len(space.basis)}; expected [n, {d}], floating"
        )
    if not K.device == before.X.device == space.basis.device:
        raise InputError(
            f"push_through: K is on {K.device}, P on {space.basis.device}, earlier keys on {before.X.device}"
        )
    refuse_nonfinite(K, "K")
    X = space.project(K)
    system = before.append(X)
    Xt, condition = system.newest(len(K))
    B, S = X, Xt
    if not full:
        mix = combinations(K).T
        B, S = mix @ B, mix @ S
    R = B - before.ridge * S - (S @ system.X.T) @ system.X  # rows; P's part is the identity on projected keys
    residual = relative_norm(R, B)
    if not residual <= tolerance:
        raise SolveError(
            f"the push-through form: relative residual {residual:.1e}, above {tolerance:.0e}", residual, condition
        )
    return Xt, system, SolveInfo(residual, condition, "float64", 0, "push-through", "full" if full else "sampled")
