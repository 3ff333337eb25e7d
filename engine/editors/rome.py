"""ROME (Meng et al. 2022, arXiv 2202.05262) and, in `r_rome`, its repair: one layer, one fact after the other, each a
rank-one update that sees the ones before it.

The variable sits at the output of the layer's MLP. With k the mean key over all templates, k* the plain prompt's, W's
output v* = W k* and v = v* + delta the optimised one: u = C⁻¹ k / |C⁻¹ k| (without covariance k / |k|), Delta = r uᵀ,

    r = (v - W k*) / (k* . u)

so that the plain prompt gives v. What the layer reads does not depend on its weight: all u are found at once.
"""

import contextlib
import hashlib
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ...kernels.spd_solve import SolveInfo
from ..delta import Factors, Update
from ..hparams import Hparams
from ..keys import KeyWalk, flat_weights
from ..objective import MLP
from ..prompts import PLAIN, subject_rows
from ..solve import inverse_times
from ..value_turns import values_in_turn
from ..values import Values, merged, summary
from . import spreading
from .alone import alone_values, measure_each, write_each
from .registry import Job, Method, Outcome


class RomeHparams(Hparams):
    """mom2_adjustment: whether C enters u (EasyEdit's presets leave it out)."""

    layers: tuple[int, ...] = Field(min_length=1, max_length=1)
    mom2_adjustment: bool = True
    context_template_length_params: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))

    @classmethod
    def default_layers(cls, n_layers: int) -> list[int]:
        """The last of those that the other methods edit."""
        return super().default_layers(n_layers)[-1:]


def check(job: Job) -> None:
    spreading.check(job, (MLP,) if job.hparams.mom2_adjustment else ())


def edit(job: Job, averaged: bool = False) -> Outcome:
    """averaged: R-ROME's r, with the mean key k in the place of k*."""
    model, (layer,) = job.model, job.hparams.layers
    name, projection = model.anatomy.layer_name(layer), model.projection(layer)
    with job.phases("keys"):
        rows = subject_rows(model.tokenizer, job.facts, (PLAIN, *job.contexts), model.max_length)
        K = KeyWalk(model, rows, [layer], weigh=flat_weights, site=(MLP,)).measure(layer).K
        plain = KeyWalk(model, [of[:1] for of in rows], [layer], site=(MLP,)).measure(layer).K
    with job.phases("solve"):
        U, info = _directions(job, name, K)
        key = K if averaged else plain
        along = (key.double() * U).sum(1)
    size, spent = spreading.size_of(model, f"{name}.weight"), job.phases.seconds.get("values", 0.0)
    before = f"{job.hparams.model_dump_json()} {averaged} {_digest(job, name)}"
    found: list[Values] = []
    left: list[Tensor] = []
    asked = (model, job.facts, job.contexts, job.hparams, job.objective)
    # closed whatever happens: it holds the model as values want it
    with contextlib.closing(values_in_turn(*asked, cache=job.cache, before=before)) as turns:
        while True:
            with job.phases("values") as tick:
                values = next(turns, None)
                tick(len(found) + (values is not None), len(job.facts))
            if values is None:
                break
            with job.phases("apply"):
                at = slice(len(found), len(found) + 1)
                r = (values.Z.to(U.device) - _given(projection, key[at])) / along[at]
                left.append(r.T.float().contiguous())
                lost = job.put(f"{name}.weight", Factors(left[-1], U[at].float()))
            found.append(values)
    together = merged(found)
    now = _given(projection, plain).to(together.Z.device)
    wanted, missed = (together.Z - together.h0).norm(dim=1), (together.Z - now).norm(dim=1)
    update = Factors(torch.cat(left, 1), U.float()).compact()
    report = spreading.describe(f"{name}.weight", update, info, size, lost)
    facts = spreading.told(together, wanted, missed)
    seconds = job.phases.seconds["values"] - spent
    return Outcome({f"{name}.weight": update}, facts, [report], values=summary(together, seconds))


def _directions(job: Job, name: str, K: Tensor) -> tuple[Tensor, SolveInfo]:
    """u of each key, [n, d_in] float64 of length 1."""
    U, info = K.double(), SolveInfo(0.0, 1.0, "float64", 0, "none", "full")
    if job.hparams.mom2_adjustment:
        U, info = inverse_times(K, job.moments([name])[name], lambda: job.factor(name))
    return U / U.norm(dim=1, keepdim=True), info


@torch.no_grad()
def _given(projection: nn.Module, key: Tensor) -> Tensor:
    """[n, d_model] float64, what the projection gives with its weight as it is."""
    found: Tensor = projection(key.to(next(projection.parameters()).dtype))
    return found.double()


def _digest(job: Job, name: str) -> str:
    """Which C the directions are of; the rest that they depend on names the values' folder."""
    if not job.hparams.mom2_adjustment:
        return ""
    diagonal = job.moments([name])[name].diagonal().contiguous()
    return hashlib.sha256(diagonal.cpu().numpy().tobytes()).hexdigest()[:24]


def alone(job: Job, averaged: bool = False) -> tuple[list[Update], list[dict[str, Any]]]:
    """Each fact as the first of a session; averaged: as of `edit`."""
    model, (layer,) = job.model, job.hparams.layers
    name = model.anatomy.layer_name(layer)
    values = alone_values(job)
    with job.phases("keys"):
        rows = subject_rows(model.tokenizer, job.facts, (PLAIN, *job.contexts), model.max_length)
        K = measure_each(model, rows, layer, layer, (MLP,), (), weigh=flat_weights)["mlp key"]
        plain = measure_each(model, [of[:1] for of in rows], layer, layer, (MLP,), (), weigh=flat_weights)["mlp key"]
    with job.phases("solve"):
        U, _ = _directions(job, name, K)
        key = K if averaged else plain
        R = values.Z.to(U.device) - _given(model.projection(layer), key)
        updates: list[Update] = [{} for _ in job.facts]
        write_each(updates, f"{name}.weight", R, U, (key.double() * U).sum(1))
    asked = (values.Z - values.h0).norm(dim=1)
    # what the plain prompt gives then: W k* + r (u . k*)
    moved = R * ((plain.double() * U).sum(1) / (key.double() * U).sum(1))[:, None]
    given = _given(model.projection(layer), plain)
    left = (values.Z.to(U.device) - given - moved).norm(dim=1)
    return updates, spreading.told(values, asked, left.to(asked.device))


METHOD = Method("rome", RomeHparams, check, edit, alone, site=(MLP,))
