"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355): MEMIT's way, with updates that stay in the null space of C.

At each layer Delta = Rᵀ Xᵀ with (P (Kᵀ K + K_pᵀ K_p) + L2 I) X = P Kᵀ: P projects onto the directions in which the
corpus has next to nothing (eigenvalues of C below `nullspace_threshold`), K_p are the keys of the session's earlier
edits, so that those stay as they are. C itself, and lambda, do not enter.
"""

from dataclasses import replace
from functools import partial

from pydantic import Field
from torch import Tensor

from ...kernels.spd_solve import KeySystem, SolveInfo
from ..delta import Factors
from ..hparams import Hparams
from ..solve import alphaedit_update
from . import spreading
from .alone import edit_alone
from .registry import Job, Method, Outcome, forget_keys


class AlphaEditHparams(Hparams):
    """nullspace_threshold: eigenvalues of C (a mean over tokens) below it count as null; L2: the ridge."""

    nullspace_threshold: float = Field(2e-2, gt=0)
    L2: float = Field(10.0, gt=0)


def check(job: Job) -> None:
    """Also that the threshold lies within the spectrum of each C."""
    spreading.check(job)
    for name in spreading.names_of(job, job.objective.site):
        job.space(name, job.hparams.nullspace_threshold)


def edit(job: Job) -> Outcome:
    earlier: dict[str, KeySystem] = job.state or {}
    grown: dict[str, KeySystem] = {}

    def solve(name: str, K: Tensor, R: Tensor) -> tuple[Factors, SolveInfo]:
        space = job.space(name, job.hparams.nullspace_threshold)
        before = earlier.get(name) or KeySystem.empty(K.shape[1], job.hparams.L2, K.device)
        factors, grown[name], info = alphaedit_update(K, R, space, before)
        return factors, info

    outcome = spreading.edit(job, solve)
    return replace(outcome, state=grown)


def directions(job: Job, name: str, K: Tensor) -> tuple[Tensor, float]:
    """Of one key: u = P k, c = L2."""
    return job.space(name, job.hparams.nullspace_threshold).project(K), job.hparams.L2


METHOD = Method(
    "alphaedit", AlphaEditHparams, check, edit, partial(edit_alone, directions=directions), forget=forget_keys
)
