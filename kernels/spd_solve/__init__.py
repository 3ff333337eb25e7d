"""Symmetric positive-definite systems: Cholesky, kept factors, closed forms in the number of keys, residuals checked.

- `spd_solve`: A X = B, one system or a batch
- `factorize`, `regular_factor` (a ridge where C has no full rank) and `woodbury`: (lambda C + Kᵀ K) X = Kᵀ on a kept
  factor of C (MEMIT and its kin), lambda = 0 being EMMET's equality
- `KeySystem`: the keys of a session as one growing system; `with_history`: MEMIT's with all earlier keys in it
- `eigenbasis`, `null_space` and `push_through`: AlphaEdit's system, earlier keys in it too
- `rls_step_`: recursive least squares
"""

from .dense import spd_solve
from .factor import Factor, factorize, fast_dtype, regular_factor
from .history import with_history
from .info import TOLERANCE, SolveError, SolveInfo
from .key_system import KeySystem, append_cholesky
from .nullspace import Eigenbasis, NullSpace, eigenbasis, null_space, push_through
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
    "with_history",
    "woodbury",
]
