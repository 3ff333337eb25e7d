"""What the locate-and-edit methods share: values, then layer by layer keys, residuals and a method's own solve.

1. Z: the value that each fact's subject should have at the z-layer (`engine.values`).
2. For each layer, ascending, with the lower ones updated already: keys K and hidden states H (`engine.keys`), and the
   method's update maps K to its share of the residual, R = (Z - H) / (layers that remain).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import InputError
from ...kernels.spd_solve import SolveInfo
from ..delta import Factors
from ..keys import KeyWalk
from ..model import editable
from ..prompts import PLAIN, Row, fact_rows, subject_rows
from ..solve import through_norm
from ..suffix import verify
from ..values import fact_columns, optimise_values, summary
from ..walk import verify_walk
from .registry import Job, Outcome

LEAST_ASKED = 1e-4  # of |h0|: a smaller residual is rounding, and a share of it says nothing

Solve = Callable[[int, Tensor, Tensor], tuple[Factors, SolveInfo]]  # (layer, K [n, d_in], R [n, d_out]) -> the update


def check(job: Job) -> None:
    """The model can be written to and is what its anatomy says, rows are short enough, and there are second moments."""
    editable(job.model)
    verify(job.model, job.hparams.layers[-1])
    verify_walk(job.model, job.hparams.layers)
    fact_rows(job.model.tokenizer, job.facts, (PLAIN, *job.contexts), job.model.max_length)
    job.moments(job.hparams.layers)


def edit(job: Job, solve: Solve) -> Outcome:
    """Writes the layers provisionally through `job.put`. Raises `InputError` where anything is not a number."""
    model, hparams = job.model, job.hparams
    job.moments(hparams.layers)  # collected now, on the unedited model
    with job.phases("values") as tick:
        values = optimise_values(
            model, job.facts, job.contexts, hparams, job.batch_size, tick, cache=job.cache, ranks=job.ranks
        )
    with job.phases("keys"):
        rows = subject_rows(model.tokenizer, job.facts, (PLAIN, *job.contexts), model.max_length)
    update, layers, asked, left = spread(job, rows, values.Z, solve)
    columns = fact_columns(values) | {
        "asked_residual": asked.tolist(),
        "achieved": [
            1 - b / a if a > LEAST_ASKED * h else None
            for a, b, h in zip(asked.tolist(), left.tolist(), values.h0.norm(dim=1).tolist(), strict=True)
        ],
    }
    facts = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Outcome(update, facts, layers, values=summary(values, job.phases.seconds["values"]))


def spread(
    job: Job, rows: list[list[Row]], Z: Tensor, solve: Solve
) -> tuple[dict[str, Factors], list[dict[str, Any]], Tensor, Tensor]:
    """Writes the layers so that the keys map to Z.

    rows: for each fact its plain row and its context rows, cut behind the subject; Z: [n, d_model]
    Returns (update, a report for each layer, |Z - H| of each fact before, and after).
    """
    model, layers = job.model, job.hparams.layers
    update: dict[str, Factors] = {}
    reports: list[dict[str, Any]] = []
    asked: Tensor | None = None
    with job.phases("keys"):
        walk = KeyWalk(model, rows, layers)
    for done, layer in enumerate(layers):
        name = model.anatomy.weight_name(layer)
        with job.phases("keys") as tick:
            found = walk.measure(layer, tick)
            K, R = found.K, Z.to(found.H.device) - found.H
            finite = bool((torch.isfinite(K).all() & torch.isfinite(R).all()).item())
        if not finite:
            raise InputError(f"{name}: its keys hold NaN or infinity; no weight was changed")
        if asked is None:
            asked = R.norm(dim=1)
        with job.phases("solve") as tick:
            # a placed model has its layers on several devices: R is on the last one's, the solve is on this one's
            part, norm = (R / (len(layers) - done)).to(K.device), model.post_norm(layer)
            if norm is not None and found.given is not None:  # what the projection must add so that the block adds it
                part = through_norm(norm, found.given, part)
            factors, info = solve(layer, K, part)
            factors = factors.compact()
            tick(done + 1, len(layers))
        update[name] = factors
        weight = model.projection(layer).weight
        assert isinstance(weight, Tensor)
        wide = torch.promote_types(weight.dtype, torch.float32)
        before = float(torch.linalg.vector_norm(weight.detach(), dtype=wide))
        with job.phases("apply"):
            lost = job.put(name, factors)
        reports.append(
            {
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
        )
    with job.phases("keys"):
        H = walk.hidden()
    assert asked is not None
    return update, reports, asked, (Z.to(H.device) - H).norm(dim=1)


def norm_of(factors: Factors) -> float:
    """The Frobenius norm of left @ right, from two [r, r] products: |LR|^2 = tr(LᵀL RRᵀ), in float64."""
    left, right = factors.left.double(), factors.right
    if right is None:
        return float(left.norm())
    right = right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
