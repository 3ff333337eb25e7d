"""Symmetric positive-definite systems: Cholesky, kept factors, closed forms in the number of keys, residuals checked.

- `spd_solve`: A X = B, one system or a batch
- `factorize`, `regular_factor` (a ridge where C has no full rank) and `woodbury`: (lambda C + Kᵀ K) X = Kᵀ on a kept
  factor of C (MEMIT and its kin)
- `eigenbasis` and `null_space`, `KeySystem` and `push_through`: AlphaEdit's system, its history a growing factor
- `rls_step_`: recursive least squares
"""

from .dense import spd_solve
from .factor import Factor, factorize, fast_dtype, regular_factor
from .info import TOLERANCE, SolveError, SolveInfo
from .nullspace import Eigenbasis, KeySystem, NullSpace, append_cholesky, eigenbasis, null_space, push_through
from .small import operation as small_solve
from .woodbury import rls_step_, woodbury

__all__ = [
    "TOLERANCE",
    "Eigenbasis",
    "Factor",
    "KeySystem",
    "NullSpace",
    "SolveError",
    "SolveInfo",
    "append_cholesky",
    "eigenbasis",
    "factorize",
    "fast_dtype",
    "null_space",
    "push_through",
    "regular_factor",
    "rls_step_",
    "small_solve",
    "spd_solve",
    "woodbury",
]
