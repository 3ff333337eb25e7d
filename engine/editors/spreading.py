"""What methods that spread an update over layers share: values, then layer by layer keys, residuals and an own solve.

1. Z: the value that each fact's subject should have in the z-layer (`engine.values`).
2. For each layer, ascending, with the lower ones updated already: keys K and what the z-layer gives, H (`engine.keys`),
   and the method's update maps K to its share of the residual, R = (Z - H) times 1 / (layers that remain), or its root.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import InputError
from ...kernels.spd_solve import SolveInfo
from ..delta import Factors
from ..entry import runs_inside
from ..keys import KeyWalk
from ..model import Model, editable
from ..objective import ATTENTION
from ..prompts import PLAIN, Row, subject_rows
from ..solve import through_norm
from ..suffix import verify
from ..values import Values, fact_columns, optimise_values, rewriting_rows, summary
from ..walk import verify_walk
from .registry import Job, Outcome

LEAST_ASKED = 1e-4  # of |h0|: a smaller residual is rounding, and a share of it says nothing

Solve = Callable[[str, Tensor, Tensor], tuple[Factors, SolveInfo]]  # (name, K [n, d_in], R [n, d_out]) -> the update
Share = Callable[[int], float]  # layers that remain, this one among them -> what this one takes of the residual


def evenly(remain: int) -> float:
    return 1 / remain


def by_root(remain: int) -> float:
    return float(remain**-0.5)


def names_of(job: Job, site: tuple[str, ...]) -> list[str]:
    """The edited projections, as statistics name them."""
    return [job.model.anatomy.layer_name(layer, part) for layer in job.hparams.layers for part in site]


def check(job: Job, site: tuple[str, ...] | None = None) -> None:
    """The model can be written to and is what its anatomy says, rows are short enough, neighbours are there where they
    are asked for, and so are second moments of what is written (of `site`; None: the objective's)."""
    editable(job.model)
    if job.hparams.layers not in job.verified:  # the model's structure, which no edit changes
        verify(job.model, job.hparams.layers[-1])
        verify_walk(job.model, job.hparams.layers)
        job.verified.add(job.hparams.layers)
    if runs_inside(job.model.anatomy, job.objective.site):  # refused where attention's projection is not known
        job.model.projection(job.hparams.layers[-1], ATTENTION)
    lacking = [fact.id for fact in job.facts if not fact.edit_neighbors] if job.objective.neighbors else []
    if lacking:
        raise InputError(
            f"neighbours were asked for, and {len(lacking)} of {len(job.facts)} facts have no edit_neighbors (first: "
            f"{lacking[0]}); expected them in each fact: `rewire neighbors MODEL DATA` finds them"
        )
    rewriting_rows(job.model, job.facts, job.contexts, job.objective)
    job.moments(names_of(job, job.objective.site if site is None else site))


def edit(job: Job, solve: Solve, share: Share = evenly, site: tuple[str, ...] | None = None) -> Outcome:
    """Writes the layers provisionally through `job.put`. Raises `InputError` where anything is not a number.

    site: what is written, of what the objective has variables for; None: all of it
    """
    model, hparams = job.model, job.hparams
    site = site or job.objective.site
    job.moments(names_of(job, site))  # collected now, on the unedited model
    spent = job.phases.seconds.get("values", 0.0)
    with job.phases("values") as tick:
        values = optimise_values(
            model,
            job.facts,
            job.contexts,
            hparams,
            job.batch_size,
            tick,
            cache=job.cache,
            ranks=job.ranks,
            objective=job.objective,
        )
    with job.phases("keys"):
        rows = subject_rows(model.tokenizer, job.facts, (PLAIN, *job.contexts), model.max_length)
    variables = dict(zip(job.objective.site, values.Z.split(model.anatomy.d_model, 1), strict=True))
    Z = torch.cat([variables[part] for part in site], 1)
    update, layers, asked, left = spread(job, rows, Z, solve, share, site)
    seconds = job.phases.seconds["values"] - spent
    return Outcome(update, told(values, asked, left), layers, values=summary(values, seconds))


def told(values: Values, asked: Tensor, left: Tensor) -> list[dict[str, Any]]:
    """What a report says of each fact; asked, left: [n], the norm of what Z asks for, before and after."""
    columns = fact_columns(values) | {
        "asked_residual": asked.tolist(),
        "achieved": [
            1 - b / a if a > LEAST_ASKED * h else None
            for a, b, h in zip(asked.tolist(), left.tolist(), values.h0.norm(dim=1).tolist(), strict=True)
        ],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def spread(
    job: Job,
    rows: list[list[Row]],
    Z: Tensor,
    solve: Solve,
    share: Share = evenly,
    site: tuple[str, ...] | None = None,
) -> tuple[dict[str, Factors], list[dict[str, Any]], Tensor, Tensor]:
    """Writes the layers so that the keys map to Z.

    rows: for each fact its plain row and its context rows, cut behind the subject; Z: [n, parts of the site * d_model]
    Returns (update, a report for each weight, |Z - H| of each fact before, and after).
    """
    model, layers, site = job.model, job.hparams.layers, site or job.objective.site
    update: dict[str, Factors] = {}
    reports: list[dict[str, Any]] = []
    asked: Tensor | None = None
    with job.phases("keys"):
        walk = KeyWalk(model, rows, layers, site=site)
    for done, layer in enumerate(layers):
        with job.phases("keys") as tick:
            found = walk.measure(layer, tick)
            R = Z.to(found.H.device) - found.H
        if asked is None:
            asked = R.norm(dim=1)
        for part, of_part in zip(site, (R * share(len(layers) - done)).split(model.anatomy.d_model, 1), strict=True):
            name = model.anatomy.layer_name(layer, part)
            K = found.attention if part == ATTENTION else found.K
            assert K is not None
            if not bool((torch.isfinite(K).all() & torch.isfinite(of_part).all().to(K.device)).item()):
                raise InputError(f"{name}.weight: its keys hold NaN or infinity; no weight was changed")
            with job.phases("solve") as tick:
                # a placed model has its layers on several devices: R is on the last one's, the solve is on this one's
                move, norm = of_part.to(K.device), model.post_norm(layer)
                if norm is not None and found.given is not None:  # what is added so that the block adds it
                    move = through_norm(norm, found.given, move)
                factors, info = solve(name, K, move)
                factors = factors.compact()
                tick(done + 1, len(layers))
            update[f"{name}.weight"] = factors
            reports.append(write(job, f"{name}.weight", factors, info))
    with job.phases("keys"):
        H = walk.hidden()
    assert asked is not None
    return update, reports, asked, (Z.to(H.device) - H).norm(dim=1)


def write(job: Job, name: str, factors: Factors, info: SolveInfo) -> dict[str, Any]:
    """Writes one weight, and says how it was solved for and how much it changed."""
    before = size_of(job.model, name)
    with job.phases("apply"):
        lost = job.put(name, factors)
    return describe(name, factors, info, before, lost)


def describe(name: str, factors: Factors, info: SolveInfo, before: float, lost: float | None) -> dict[str, Any]:
    """What a report says of one weight.

    before: its norm before the update; lost: the share of that that rounding lost, None: not known yet
    """
    return {
        "weight": name,
        "residual": info.residual,
        "condition": info.condition,
        "solved_in": info.dtype,
        "solved_by": info.method,
        "checked": info.checked,
        "ridge": info.ridge,
        "relative_change": norm_of(factors) / before,
        "lost_to_rounding": lost,
    }


def size_of(model: Model, name: str) -> float:
    """A weight's Frobenius norm, summed in float32 at least."""
    weight = model.hf.get_parameter(name).detach()
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


def norm_of(factors: Factors) -> float:
    """The Frobenius norm of left @ right, from two [r, r] products: |LR|^2 = tr(LᵀL RRᵀ), in float64."""
    left, right = factors.left.double(), factors.right
    if right is None:
        return float(left.norm())
    right = right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
