"""PMET (Li et al. 2024, arXiv 2308.08742): MEMIT's update, with values for attention and MLP of their own.

Two variables are optimised together, at the outputs of the z-layer's attention and MLP projections. At each layer
Delta = Rᵀ Xᵀ with (lambda C + Kᵀ K) X = Kᵀ, R = (Z - H) / sqrt(layers that remain), H what the z-layer's projection
gives. As published only the MLP's are written, and what attention's variable found is dropped; with both modules named
in `rewrite_module_tmps`, each has its own keys, C and residual, read before either of a layer is written.
"""

from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import Tensor

from ...kernels.errors import InputError
from ...kernels.spd_solve import SolveInfo
from ..anatomy import Anatomy
from ..delta import Factors, Update
from ..hparams import Hparams
from ..objective import ATTENTION, MLP
from ..solve import memit_update
from . import memit, spreading
from .alone import edit_alone
from .registry import Job, Method, Outcome


class PmetHparams(Hparams):
    """nll_loss_factor: weight of the likelihood in the loss, a tenth of it while the target is certain
    rewrite_module_tmps: published names of the written modules: the MLP's output projection, or it and attention's
    """

    nll_loss_factor: float = Field(1.0, gt=0)
    rewrite_module_tmps: tuple[str, ...] | None = Field(None, min_length=1)

    def check(self, anatomy: Anatomy, where: Callable[[str], str]) -> None:
        super().check(anatomy, where)
        known = published_names(anatomy)
        named = self.rewrite_module_tmps or ()
        if len(set(named)) < len(named):
            raise InputError(f"{where('rewrite_module_tmps')}: rewrite_module_tmps names a module twice: {list(named)}")
        for name in named:
            if name not in known:
                raise InputError(
                    f"{where('rewrite_module_tmps')}: rewrite_module_tmps holds {name!r}, this model has "
                    f"{' and '.join(map(repr, known))}"
                )


def published_names(anatomy: Anatomy) -> dict[str, str]:
    """Published name of a module, such as `transformer.h.{}.mlp.c_proj` -> which part it is."""
    parts = (MLP, ATTENTION) if anatomy.attention else (MLP,)
    return {anatomy.layer_name(0, part).replace(".0.", ".{}.", 1): part for part in parts}


def written(job: Job) -> tuple[str, ...]:
    known = published_names(job.model.anatomy)
    return tuple(known[name] for name in job.hparams.rewrite_module_tmps or ()) or (MLP,)


def check(job: Job) -> None:
    spreading.check(job, written(job))


def edit(job: Job) -> Outcome:
    def solve(name: str, K: Tensor, R: Tensor) -> tuple[Factors, SolveInfo]:
        C = job.moments([name])[name]
        return memit_update(K, R, C, job.hparams.mom2_update_weight, lambda: job.factor(name))

    return spreading.edit(job, solve, spreading.by_root, written(job))


def alone(job: Job) -> tuple[list[Update], list[dict[str, Any]]]:
    return edit_alone(job, memit.directions, spreading.by_root, written(job))


METHOD = Method("pmet", PmetHparams, check, edit, alone, site=(MLP, ATTENTION))
