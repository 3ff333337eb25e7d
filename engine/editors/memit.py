"""MEMIT (Meng et al. 2023, arXiv 2210.07229): many facts at once, spread over several MLP output projections.

At each layer Delta = Rᵀ Xᵀ with (lambda C + Kᵀ K) X = Kᵀ; lambda is `mom2_update_weight`.
"""

from functools import partial

from torch import Tensor

from ...kernels.spd_solve import SolveInfo
from ..delta import Factors
from ..hparams import Hparams
from ..solve import inverse_times, memit_update
from . import spreading
from .alone import edit_alone
from .registry import Job, Method, Outcome


def edit(job: Job) -> Outcome:
    def solve(name: str, K: Tensor, R: Tensor) -> tuple[Factors, SolveInfo]:
        C = job.moments([name])[name]
        return memit_update(K, R, C, job.hparams.mom2_update_weight, lambda: job.factor(name))

    return spreading.edit(job, solve)


def directions(job: Job, name: str, K: Tensor) -> tuple[Tensor, float]:
    """Of one key: u = (lambda C)⁻¹ k, c = 1."""
    U, _ = inverse_times(K, job.moments([name])[name], lambda: job.factor(name))
    return U / job.hparams.mom2_update_weight, 1.0


METHOD = Method("memit", Hparams, spreading.check, edit, partial(edit_alone, directions=directions))
