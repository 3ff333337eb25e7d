"""Facts edited each alone: as if each were the only edit of the weights as they are, all of them in one batch.

With a single key k and residual r every closed form of the family is Delta = rᵀ u / (c + k . u), of rank one; only u,
c, and what the residual is of, are a method's own. Layer by layer, keys and residuals of each fact are measured under
its own update of the lower ones, beside the weights: nothing is written.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.errors import InputError
from ...stats.collect import batches
from ..beside import Beside
from ..delta import Factors, Update
from ..keys import key_weights
from ..model import Model
from ..objective import ATTENTION, BLOCK, MLP
from ..passes import Stop, forward, forward_bytes, fused, hidden_of, hooks, tokens_that_fit
from ..prompts import PLAIN, Row, pad, subject_rows
from ..solve import through_norm
from ..values import optimise_values
from . import spreading
from .registry import Job

# (job, name of the projection, K [n, d_in]) -> (U [n, d_in] float64, c)
Directions = Callable[[Job, str, Tensor], tuple[Tensor, float]]


def edit_alone(
    job: Job, directions: Directions, share: spreading.Share = spreading.evenly, site: tuple[str, ...] | None = None
) -> tuple[list[Update], list[dict[str, Any]]]:
    """(of each fact its update, what a report says of each fact).

    site: what is written, of what the objective has variables for; None: all of it
    Raises `InputError` where anything is not a number, and in a session that has edited already.
    """
    if job.state:
        raise InputError("each fact alone: the session has edits whose keys count; begin a new session for it")
    model, hparams, site = job.model, job.hparams, site or job.objective.site
    job.moments(spreading.names_of(job, site))
    values = alone_values(job)
    rows = subject_rows(model.tokenizer, job.facts, (PLAIN, *job.contexts), model.max_length)
    variables = dict(zip(job.objective.site, values.Z.split(model.anatomy.d_model, 1), strict=True))
    updates: list[Update] = [{} for _ in job.facts]

    def missed(read: dict[str, Tensor]) -> dict[str, Tensor]:
        """Z - H of each part."""
        return {part: variables[part] - read[part].to(values.Z.device) for part in site}

    asked: Tensor | None = None
    for done, layer in enumerate(hparams.layers):
        with job.phases("keys"):
            read = measure_each(model, rows, layer, hparams.layers[-1], site, updates if done else ())
        with job.phases("solve"):
            residuals = missed(read)
            asked = torch.cat([*residuals.values()], 1).norm(dim=1) if asked is None else asked
            for part, R in residuals.items():
                R = R * share(len(hparams.layers) - done)
                K = read[f"{part} key"]
                norm = model.post_norm(layer)
                if norm is not None and part == BLOCK:
                    R = through_norm(norm, read["given"], R)
                name = model.anatomy.layer_name(layer, part)
                U, c = directions(job, name, K)
                write_each(updates, f"{name}.weight", R, U, c + (K.double() * U).sum(1))
    with job.phases("keys"):
        read = measure_each(model, rows, hparams.layers[-1], hparams.layers[-1], site, updates, keys=False)
    left = torch.cat([*missed(read).values()], 1).norm(dim=1)
    assert asked is not None
    return updates, spreading.told(values, asked, left)


def alone_values(job: Job) -> Any:
    with job.phases("values") as tick:
        return optimise_values(
            job.model, job.facts, job.contexts, job.hparams, job.batch_size, tick,
            cache=job.cache, ranks=job.ranks, objective=job.objective,
        )  # fmt: skip


def write_each(updates: list[Update], name: str, R: Tensor, U: Tensor, denominator: Tensor) -> None:
    """Puts R uᵀ / denominator into each fact's update. R: [n, d_out]; U: [n, d_in]; denominator: [n]."""
    left = R.double().to(U.device) / denominator[:, None]
    if not bool(torch.isfinite(left).all() & torch.isfinite(U).all()):
        raise InputError(f"{name}: an update holds NaN or infinity; nothing was changed")
    for update, u, v in zip(updates, left.float(), U.float(), strict=True):
        update[name] = Factors(u[:, None].contiguous(), v[None].contiguous())


@torch.no_grad()
def measure_each(
    model: Model,
    rows: Sequence[Sequence[Row]],
    layer: int,
    z_layer: int,
    site: tuple[str, ...],
    updates: Sequence[Update],
    keys: bool = True,
    weigh: Callable[[int], Tensor] = key_weights,
) -> dict[str, Tensor]:
    """What each fact's solve of a layer starts from, under its own update: float32.

    rows: of each fact its plain row and its context rows, cut behind the subject; updates: empty: none has one yet
    Returns for each part of the site "<part> key" [n, d_in] (weighted over the rows; not with keys=False), and "<part>"
    [n, d_model], what is there in the z-layer on the plain row; and "given" [n, d_model], what the layer's MLP
    projection gives there.
    """
    n, budget = len(rows), tokens_that_fit(model, forward_bytes(model))
    found: dict[str, Tensor] = {}
    flat = [(fact, place, row) for fact, of in enumerate(rows) for place, row in enumerate(of)]
    with fused(model), Beside(model, updates) if updates else nullcontext() as beside:
        for plain in (True, False) if keys else (True,):
            chosen = [each for each in flat if (each[1] == 0) is plain]
            for batch in batches([len(row.ids) for *_, row in chosen], budget):
                part_of = [chosen[i] for i in batch]
                if beside is not None:
                    beside.enter([fact for fact, *_ in part_of])
                read = _forward(model, [row for *_, row in part_of], layer, z_layer, site, plain)
                facts = torch.tensor([fact for fact, *_ in part_of])
                weights = torch.tensor([float(weigh(len(rows[fact]) - 1)[place]) for fact, place, _ in part_of])
                for name, value in read.items():
                    is_key = name.endswith(" key")
                    scaled = value * weights[:, None].to(value.device) if is_key else value
                    into = found.setdefault(name, value.new_zeros(n, value.shape[1]))
                    into.index_add_(0, facts.to(value.device), scaled)
    return found


def _forward(
    model: Model, rows: Sequence[Row], layer: int, z_layer: int, site: tuple[str, ...], plain: bool
) -> dict[str, Tensor]:
    """One forward, up to the last of what is read at each row's position."""
    at = torch.tensor([row.position for row in rows])
    lines = torch.arange(len(rows))
    read: dict[str, Tensor] = {}
    handles = []

    def keep(name: str, hidden: Tensor) -> None:
        read[name] = hidden[lines.to(hidden.device), at.to(hidden.device)].float()

    def reads(part: str) -> Callable[..., None]:
        return lambda module, args: keep(f"{part} key", args[0])

    def gives(name: str, last: bool = False) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            keep(name, hidden_of(output))
            if last:
                raise Stop

        return hook

    for part in site:
        module = model.projection(layer, ATTENTION if part == ATTENTION else MLP)
        handles.append(module.register_forward_pre_hook(reads(part)))
    if plain:
        handles.append(model.projection(layer).register_forward_hook(gives("given")))
        for part in site:
            if part != BLOCK:
                handles.append(model.projection(z_layer, part).register_forward_hook(gives(part)))
    # of context rows nothing behind the layer is read, of plain ones nothing behind the z-layer's block
    end = model.block(z_layer if plain else layer)
    handles.append(end.register_forward_hook(gives(BLOCK, last=True)))
    with hooks(*handles):
        forward(model, pad(rows, model.device))
    if BLOCK not in site or not plain:
        del read[BLOCK]
    return read
