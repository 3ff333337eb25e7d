"""One round of the optimisation: some facts, each at a step of its own, go on until most of them are done.

Loss of a fact (MEMIT, arXiv 2210.07229, as published):
  mean over rewriting rows of mean over label tokens of -log p
  + kl_factor KL(p_now || p_first) at the subject's last token of "{} is a"
  + v_weight_decay |delta| / |h0|^2, a sum over its variables

PMET (arXiv 2308.08742, as published) weighs the first with a factor. Once every label is the most probable token, the
next step has a tenth of it, and a fact is done where its KL term is then at most 0.01.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels.target_nll import target_nll
from .hparams import Hparams
from .model import Model
from .objective import MEMIT, Objective
from .passes import Map
from .value_groups import Group

STOP_LOSS = 0.05
CERTAIN_SHARE, CERTAIN_KL = 0.1, 0.01  # PMET: of the factor, and where a certain fact is done
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

Table = dict[str, Tensor]  # columns of one length: a row for each fact


def pick(table: Mapping[str, Tensor], rows: Sequence[int] | Tensor) -> Table:
    index = torch.as_tensor(rows, dtype=torch.long)
    return {name: column[index.to(column.device)] for name, column in table.items()}


def stack(tables: Sequence[Mapping[str, Tensor]]) -> Table:
    """One below the other."""
    return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}


def fresh(h0: Tensor, first: torch.dtype, forwards: int, d_model: int) -> Table:
    """The state of facts that have not moved; everything that a round needs of one, but its rows.

    delta, m, v: [n, variables * d_model] float32, the variables and Adam's moments
    h0: as delta, what is there at the subject on the plain prompt
    first: [n, d_model], what the head reads at the KL row at delta = 0, in the model's dtype; from the first forward
    step: [n] int64, updates made
    certain: [n] bool, every label was the most probable token at the last step
    first_nll: [n]; losses: [n, forwards] float32, NaN behind the last
    """
    facts, width = h0.shape

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(facts, *shape, dtype=dtype, device=h0.device)

    return {
        **{name: zeros(width) for name in ("delta", "m", "v")},
        "h0": h0,
        "first": zeros(d_model, dtype=first),
        "step": zeros(dtype=torch.long),
        "certain": zeros(dtype=torch.bool),
        "first_nll": zeros(),
        "losses": zeros(forwards).fill_(torch.nan),
    }


def run_steps(
    model: Model,
    groups: list[Group],
    state: Table,
    hparams: Hparams,
    in_parallel: Map = map,
    objective: Objective = MEMIT,
) -> Iterator[tuple[Tensor, Table, Table]]:
    """Behind each step (done: [n] bool, what is known of each fact, the state of each), until all facts are done.

    Facts that are done leave at once, and never move again. What is known counts where a fact is done, the state where
    it is not; `state` itself stays as it was. groups: of these facts; the list shrinks as they leave.
    in_parallel: a `map` over groups
    """
    delta, m, v, h0, step = (state[name] for name in ("delta", "m", "v", "h0", "step"))
    first, losses, first_nll = state["first"].clone(), state["losses"].clone(), state["first_nll"]
    certain = state["certain"]
    variables = len(objective.site)

    def sizes(of: Tensor) -> Tensor:
        """[n, variables], the norm of each."""
        return of.view(len(of), variables, -1).norm(dim=2)

    def times(each: Tensor, of: Tensor) -> Tensor:
        """Each variable times its number of `each` [n, variables]."""
        return (of.view(len(of), variables, -1) * each[:, :, None]).view_as(of)

    radius = hparams.clamp_norm_factor * sizes(h0)
    decay = hparams.v_weight_decay / sizes(h0) ** 2
    last_nll = torch.zeros_like(first_nll)
    going = torch.ones_like(step, dtype=torch.bool)
    while going.any():
        final = going & (step == hparams.v_num_grad_steps - 1)  # their last forward is only looked at
        factor = (objective.nll_factor or 1.0) * torch.where(certain, CERTAIN_SHARE, 1.0)
        weights = (factor, hparams.kl_factor)
        work = partial(_part, model, weights, delta, first, step == 0, going, final if final.any() else None)
        groups[:], *parts = zip(*in_parallel(work, groups), strict=True)
        nll, kl, missed, gradient = (torch.stack(part).sum(0) for part in parts)
        groups[:] = [group for group in groups if len(group.fact)]
        norm = sizes(delta)
        loss = factor * nll + hparams.kl_factor * kl + (decay * norm).sum(1)
        first_nll = torch.where(going & (step == 0), nll, first_nll)  # one that is done at once has no rows later
        last_nll = torch.where(going, nll, last_nll)
        row = torch.arange(len(step), device=step.device)
        losses[row, step] = torch.where(going, loss, losses[row, step])
        going = going & (loss >= STOP_LOSS) & ~final  # false for NaN too
        if objective.nll_factor is not None:
            certain = torch.where(going, missed == 0, certain)
            going = going & ~(certain & (hparams.kl_factor * kl <= CERTAIN_KL))
        # |delta| has subgradient 0 at 0
        unit = delta.view(len(delta), variables, -1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, :, None]
        gradient = gradient + times(decay, unit.view_as(delta))
        moved_m, moved_v = BETA1 * m + (1 - BETA1) * gradient, BETA2 * v + (1 - BETA2) * gradient**2
        moved = adam(delta, moved_m, moved_v, step + 1, hparams.v_lr)
        norm = sizes(moved)
        moved = torch.where((norm > radius).any(1, keepdim=True), times((radius / norm).clamp_max(1), moved), moved)
        delta, m, v = (
            torch.where(going[:, None], new, old) for new, old in ((moved, delta), (moved_m, m), (moved_v, v))
        )
        step = step + going
        known = {
            "Z": h0 + delta,
            "h0": h0,
            "first_nll": first_nll,
            "last_nll": last_nll,
            "loss": losses[row, step],
            "steps": step,
            "losses": losses,
        }
        now = {"delta": delta, "m": m, "v": v, "h0": h0, "first": first, "step": step}
        yield ~going, known, now | {"certain": certain, "first_nll": first_nll, "losses": losses}


def adam(delta: Tensor, m: Tensor, v: Tensor, step: Tensor, lr: float) -> Tensor:
    """delta behind an update; step: [n], the number of this update of each fact, from 1."""
    # in float64, as one fact's own numbers are
    share = step.double()[:, None]
    rate, scale = lr / (1 - BETA1**share), 1 - BETA2**share
    return delta - rate.to(delta.dtype) * m / ((v / scale.to(v.dtype)).sqrt() + EPS)


def _part(
    model: Model,
    weights: tuple[Tensor, float],
    delta: Tensor,
    first: Tensor,
    new: Tensor,
    going: Tensor,
    final: Tensor | None,
    group: Group,
) -> tuple[Group, Tensor, Tensor, Tensor, Tensor]:
    """What is left of a group, and its part of each fact's nll, KL and missed labels ([facts]) and of their gradient
    ([facts, variables * d]).

    weights: of the nll ([facts]) and the KL in the loss
    final: [facts] bool, those that are only looked at, and leave; None: none is
    """
    nll, kl, missed = (torch.zeros_like(delta[:, 0]) for _ in range(3))
    found = _Sums(nll, kl, missed, torch.zeros_like(delta))
    group = group.only(going)
    if final is not None:
        _add_loss(model, group.only(final), delta, new, first, None, found)
        group = group.only(~final)
    _add_loss(model, group, delta, new, first, weights, found)
    return group, found.nll, found.kl, found.missed, found.gradient


@dataclass(frozen=True)
class _Sums:
    nll: Tensor
    kl: Tensor
    missed: Tensor
    gradient: Tensor


def _add_loss(
    model: Model,
    group: Group,
    delta: Tensor,
    new: Tensor,
    first: Tensor,
    weights: tuple[Tensor, float] | None,
    found: _Sums,
) -> None:
    """Adds the group's part of each fact to what was found; of the gradient where there are weights.

    new: [facts] bool, those at delta = 0, whose `first` is found here
    """
    if not len(group.fact):
        return
    head, bias, softcap = model.head_parts()
    with torch.set_grad_enabled(weights is not None):
        moved = delta.detach().requires_grad_(weights is not None)
        read_row = torch.cat([group.label_row, group.kl_row])
        read_position = torch.cat([group.label_at, group.suffix.start[group.kl_row]])
        hidden = group.suffix(moved, group.fact, (read_row, read_position)).to(head.device)
        asked = group.fact[group.kl_row]
        at_first = hidden[len(group.label) :].detach().to(first.device)
        first[asked] = torch.where(new[asked][:, None], at_first, first[asked])
        nll, kl, missed = target_nll(
            hidden,
            head,
            group.label.to(head.device),
            group.fact[read_row].to(head.device),
            torch.cat([group.label_weight, torch.ones_like(group.kl_row, dtype=torch.float32)]).to(head.device),
            len(delta),
            first=first[asked].to(head.device, hidden.dtype),
            bias=bias,
            softcap=softcap,
        )
        if weights is not None:
            of_nll, of_kl = weights
            (gradient,) = torch.autograd.grad((of_nll.to(nll.device) * nll).sum() + of_kl * kl.sum(), moved)
            found.gradient.add_(gradient)
    for total, part in ((found.nll, nll), (found.kl, kl), (found.missed, missed)):
        total.add_(part.detach().to(total.device))
