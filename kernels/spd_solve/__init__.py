"""Symmetric positive-definite systems: Cholesky, kept factors, closed forms in the number of keys, residuals checked.

- `spd_solve`: A X = B, one system or a batch
- `factorize` and `woodbury`: (lambda C + Kᵀ K) X = Kᵀ on a kept factor of C (MEMIT and its kin)
- `null_space`, `KeySystem` and `push_through`: AlphaEdit's system, its history a growing factor
- `rls_step_`: recursive least squares
"""

from .dense import spd_solve
from .factor import Factor, factorize
from .info import TOLERANCE, SolveError, SolveInfo
from .nullspace import KeySystem, NullSpace, append_cholesky, null_space, push_through
from .small import operation as small_solve
from .woodbury import rls_step_, woodbury

__all__ = [
    "TOLERANCE",
    "Factor",
    "KeySystem",
    "NullSpace",
    "SolveError",
    "SolveInfo",
    "append_cholesky",
    "factorize",
    "null_space",
    "push_through",
    "rls_step_",
    "small_solve",
    "spd_solve",
    "woodbury",
]
