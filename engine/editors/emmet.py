"""EMMET (Gupta et al. 2024, arXiv 2403.14236): MEMIT's aim as a constraint: the keys must map to their values.

At each layer Delta = Rᵀ (K C'⁻¹ Kᵀ + emmet_lambda I)⁻¹ K C'⁻¹ with C' = mom2_update_weight C + update_norm_lambda I.
With emmet_lambda 0 the constraint holds exactly; else it is MEMIT's update with lambda C := emmet_lambda C'.
"""

from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from ...kernels.spd_solve import SolveInfo, regular_factor
from ..delta import Factors
from ..hparams import Hparams
from ..solve import inverse_times, memit_update
from . import spreading
from .alone import edit_alone
from .registry import Job, Method, Outcome


class EmmetHparams(Hparams):
    """emmet_lambda: how much the constraint gives way; update_norm_lambda: a ridge that C gets."""

    emmet_lambda: float = Field(0.1, ge=0)
    update_norm_lambda: float = Field(0.0, ge=0)


def edit(job: Job) -> Outcome:
    asked = job.hparams
    weight, ridge = asked.emmet_lambda * asked.mom2_update_weight, asked.update_norm_lambda / asked.mom2_update_weight

    def solve(name: str, K: Tensor, R: Tensor) -> tuple[Factors, SolveInfo]:
        C = job.moments([name])[name]
        if not ridge:
            return memit_update(K, R, C, weight, lambda: job.factor(name))
        C = C.to(K.device, copy=True)
        C.diagonal().add_(ridge)
        return memit_update(K, R, C, weight)

    return spreading.edit(job, solve)


def directions(job: Job, name: str, K: Tensor) -> tuple[Tensor, float]:
    """Of one key: u = C'⁻¹ k, c = emmet_lambda."""
    asked = job.hparams
    C = job.moments([name])[name]
    if not asked.update_norm_lambda:
        U, _ = inverse_times(K, C, lambda: job.factor(name))
        return U / asked.mom2_update_weight, asked.emmet_lambda
    C = C.to(K.device, torch.float64, copy=True).mul_(asked.mom2_update_weight)
    C.diagonal().add_(asked.update_norm_lambda)
    U, _ = inverse_times(K, C, lambda: regular_factor(C))
    return U, asked.emmet_lambda


METHOD = Method("emmet", EmmetHparams, spreading.check, edit, partial(edit_alone, directions=directions))
