"""How a solve went, and how it is refused."""

from dataclasses import dataclass

from ..errors import InputError

TOLERANCE = 1e-6
SAMPLES = 8  # random combinations of columns that a sampled residual looks at


@dataclass(frozen=True)
class SolveInfo:
    """How a solve went: goes into the report. Of a batch of systems it holds the worst.

    residual: ‖A X - B‖ / ‖B‖ (Frobenius, measured in fp64 on the X that is returned; 0 if B is 0)
    condition: lower bound of the scaled matrix's 2-norm condition: (max diag L / min diag L)², L its Cholesky factor
    dtype: "float64" or "float32": what the factor was computed in
    refinements: steps of conjugate gradients taken with that factor as the preconditioner
    method: "cholesky", "factor" (a kept one), "woodbury", "push-through" or "history"
    checked: "full", or "sampled": the residual of 8 random combinations of the columns
    ridge: what was added to the diagonal of a second moment without full rank, in its units; else 0
    """

    residual: float
    condition: float
    dtype: str
    refinements: int
    method: str = "cholesky"
    checked: str = "full"
    ridge: float = 0.0


_ADVICE = (
    "Collect statistics over more tokens (at least 2 per dimension), "
    "or raise lambda (mom2_update_weight) or the ridge (L2)"
)


class SolveError(InputError):
    """The system cannot be solved to the tolerance: collect more tokens, or raise lambda or the ridge.

    what: the reason alone
    advice: what to do, where it is something else
    residual: of the best X found; NaN where none came about
    condition: as in SolveInfo; where Cholesky broke down 1 / (n eps), which is about the least that makes it break
    """

    def __init__(self, what: str, residual: float, condition: float, advice: str = _ADVICE) -> None:
        super().__init__(f"spd_solve: {what}; condition of the Jacobi-scaled matrix at least {condition:.1e}. {advice}")
        self.what = what
        self.residual = residual
        self.condition = condition
