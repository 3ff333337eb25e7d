"""MEMIT with history (OTE-SE: "Labyrinth and Thread", arXiv 2605.26670): batch after batch what one edit would give.

At each layer Delta = Rᵀ Xᵀ with (lambda C + K_pᵀ K_p + Kᵀ K) X = Kᵀ: K_p are the keys of the session's earlier edits,
R = Z - H what the weights as they are now miss. With one layer, and keys and values of the unedited model, this is
recursive least squares: the sum of all updates is the update of all facts at once. Over several layers keys and values
are those of an edited model, and the two differ (docs/methods.md).
"""

from dataclasses import replace

from torch import Tensor

from ...kernels.spd_solve import KeySystem, SolveInfo
from ..delta import Factors
from ..hparams import Hparams
from ..solve import memit_history_update
from . import memit, spreading
from .registry import Job, Method, Outcome, forget_keys


def edit(job: Job) -> Outcome:
    earlier: dict[str, KeySystem] = job.state or {}
    grown: dict[str, KeySystem] = {}

    def solve(name: str, K: Tensor, R: Tensor) -> tuple[Factors, SolveInfo]:
        C = job.moments([name])[name]
        before = earlier.get(name) or KeySystem.empty(K.shape[1], job.hparams.mom2_update_weight, K.device)
        factors, grown[name], info = memit_history_update(K, R, C, job.factor(name), before)
        return factors, info

    return replace(spreading.edit(job, solve), state=grown)


METHOD = Method("memit-history", Hparams, spreading.check, edit, memit.METHOD.alone, forget=forget_keys)
