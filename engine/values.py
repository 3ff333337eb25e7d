"""Target values Z: what the z-layer's block should give at each subject, optimised for many facts at once.

One variable delta a fact, added to the z-layer's output at the subject's last token of all its rows. Facts never see
each other: each has its own Adam state, stop and clamp, so a batch takes the same path as one fact alone. The blocks
up to the z-layer run once; each step runs the blocks above, and the head at label rows only.

Loss of a fact (MEMIT, arXiv 2210.07229, as published):
  mean over rewriting rows of mean over label tokens of -log p
  + kl_factor KL(p_now || p_first) at the subject's last token of "{} is a"
  + v_weight_decay |delta| / |h0|^2
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.errors import InputError
from .facts import Fact
from .hparams import Hparams
from .model import Model
from .passes import MEMORY_SHARE, Suffix, blocks_until, free_bytes, frozen
from .prompts import PLAIN, Row, fact_rows, kl_rows, pad

STOP_LOSS = 0.05
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
CPU_FACTS = 16  # a batch beyond this many facts leaves the caches of a CPU (docs/benchmarks.md)
GPU_FACTS = 512


@dataclass(frozen=True)
class Values:
    """Z and how each fact's optimisation went; all on the model's device.

    Z: [n, d_model] float32, h0 + delta
    h0: [n, d_model] float32, the z-layer's output at the subject on the plain prompt
    first_nll, last_nll: [n] mean negative log-likelihood of the target before, and with delta, in nats
    loss: [n] the last loss
    steps: [n] int64, Adam updates made
    """

    Z: Tensor
    h0: Tensor
    first_nll: Tensor
    last_nll: Tensor
    loss: Tensor
    steps: Tensor


@dataclass(frozen=True)
class _Rows:
    """A batch's token rows (fact-major: its rewriting rows, then its KL row) and what is read where."""

    hidden: Tensor  # [rows, T, d_model] the z-layer's output
    fact: Tensor  # [rows] which fact a row belongs to
    position: Tensor  # [rows] the subject's last token
    label_row: Tensor  # [m] row of each label
    label_at: Tensor  # [m] position that predicts it
    label: Tensor  # [m] token id
    label_weight: Tensor  # [m] 1 / (labels of its row * rewriting rows of its fact)
    kl_row: Tensor  # [facts] the fact's KL row

    def of(self, facts: Tensor) -> "_Rows":
        """The rows of some facts, renumbered."""
        device = self.hidden.device
        number = torch.full((int(self.fact.max()) + 1,), -1, device=device)
        number[facts] = torch.arange(len(facts), device=device)
        rows = (number[self.fact] >= 0).nonzero()[:, 0]
        place = torch.full((len(self.fact),), -1, device=device)
        place[rows] = torch.arange(len(rows), device=device)
        labels = (place[self.label_row] >= 0).nonzero()[:, 0]
        return _Rows(
            self.hidden[rows],
            number[self.fact[rows]],
            self.position[rows],
            place[self.label_row[labels]],
            self.label_at[labels],
            self.label[labels],
            self.label_weight[labels],
            place[self.kl_row[facts]],
        )


def optimise_values(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Values:
    """Target values of all facts.

    contexts: generated context templates; the plain one is added in front
    batch_size: facts optimised at once; None: as many as the free memory holds
    Raises `InputError` when a loss is no number (the model, or the learning rate, is broken).
    """
    templates = (PLAIN, *contexts)
    rewriting = fact_rows(model.tokenizer, facts, templates, model.max_length)
    kl = kl_rows(model.tokenizer, facts)
    longest = [max(len(row.ids) for row in group) for group in rewriting]
    size = batch_size or facts_that_fit(model, hparams, max(longest), len(templates) + 1)
    order = sorted(range(len(facts)), key=lambda i: longest[i])  # equal lengths together: little padding
    parts: list[Values] = []
    with frozen(model):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows = _layout(model, hparams.layers[-1], [rewriting[i] for i in chosen], [kl[i] for i in chosen])
            values = _optimise(model, rows, hparams)
            broken = (~torch.isfinite(values.loss)).nonzero()[:, 0].tolist()
            if broken:
                names = ", ".join(facts[chosen[i]].id for i in broken)
                raise InputError(f"the loss of facts {names} is not a number; no weight was changed (lower v_lr?)")
            parts.append(values)
            progress(start + len(chosen), len(facts))
    back = torch.tensor(order, device=model.device).argsort()
    return Values(*(torch.cat([getattr(part, name) for part in parts])[back] for name in Values.__dataclass_fields__))


def facts_that_fit(model: Model, hparams: Hparams, tokens: int, rows: int) -> int:
    """Facts of `rows` rows of `tokens` tokens whose saved activations fit into the free memory."""
    anatomy = model.anatomy
    item = next(model.hf.parameters()).element_size()
    above = anatomy.n_layers - hparams.layers[-1] - 1
    saved = item * above * (12 * anatomy.d_model + 4 * anatomy.d_in)  # a token's activations kept for the backward
    head = 4 * 4 * anatomy.vocab * 2  # two labels a row, some float32 copies of their logits
    room = MEMORY_SHARE * free_bytes(model.device)
    cap = GPU_FACTS if model.device.type == "cuda" else CPU_FACTS
    return max(1, min(cap, int(room / (rows * (tokens * saved + head)))))


def _layout(model: Model, layer: int, rewriting: Sequence[Sequence[Row]], kl: Sequence[Row]) -> _Rows:
    rows: list[Row] = []
    owner: list[int] = []
    label_row: list[int] = []
    label_at: list[int] = []
    label: list[int] = []
    label_weight: list[float] = []
    kl_at: list[int] = []
    for fact, group in enumerate(rewriting):
        for row in group:
            first = len(row.ids) - len(row.labels)
            label_row += [len(rows)] * len(row.labels)
            label_at += range(first, len(row.ids))
            label += row.labels
            label_weight += [1.0 / (len(row.labels) * len(group))] * len(row.labels)
            rows.append(row)
        kl_at.append(len(rows))
        rows.append(kl[fact])
        owner += [fact] * (len(group) + 1)
    hidden = blocks_until(model, pad(rows, model.device), layer)
    device = hidden.device
    return _Rows(
        hidden,
        torch.tensor(owner, device=device),
        torch.tensor([row.position for row in rows], device=device),
        torch.tensor(label_row, device=device),
        torch.tensor(label_at, device=device),
        torch.tensor(label, device=device),
        torch.tensor(label_weight, device=device),
        torch.tensor(kl_at, device=device),
    )


def _optimise(model: Model, rows: _Rows, hparams: Hparams) -> Values:
    count = len(rows.kl_row)
    suffix = Suffix(model, hparams.layers[-1], rows.hidden.shape[1])
    plain = torch.searchsorted(rows.fact, torch.arange(count, device=rows.fact.device))  # each fact's first row
    h0 = rows.hidden[plain, rows.position[plain]].float()
    radius = hparams.clamp_norm_factor * h0.norm(dim=1)
    decay = hparams.v_weight_decay / h0.norm(dim=1) ** 2

    active = torch.arange(count, device=h0.device)  # facts that still move
    final = h0.new_zeros(count, h0.shape[1])
    first_nll, last_nll, last_loss = (h0.new_zeros(count) for _ in range(3))
    steps = torch.zeros(count, dtype=torch.long, device=h0.device)
    delta = torch.zeros_like(h0)
    m, v = torch.zeros_like(h0), torch.zeros_like(h0)
    p_first: Tensor | None = None

    for step in range(hparams.v_num_grad_steps):
        last = step == hparams.v_num_grad_steps - 1  # the last forward is only looked at
        delta.requires_grad_(not last)
        loss, nll, p_now = _loss(model, suffix, rows, delta, p_first, decay, hparams.kl_factor)
        if p_first is None:
            p_first = p_now.detach()
            first_nll = nll.detach()
        last_nll[active], last_loss[active] = nll.detach(), loss.detach()
        final[active], steps[active] = delta.detach(), step
        going = (loss.detach() >= STOP_LOSS) & torch.isfinite(loss.detach())
        if last or not going.any():
            break
        (gradient,) = torch.autograd.grad(loss[going].sum(), delta)
        delta = delta.detach()
        if not going.all():  # finished facts leave the batch, with their variable and Adam state as they are
            keep = going.nonzero()[:, 0]
            rows, active = rows.of(keep), active[keep]
            delta, gradient, m, v = delta[keep], gradient[keep], m[keep], v[keep]
            radius, decay, p_first = radius[keep], decay[keep], p_first[keep]
        m = BETA1 * m + (1 - BETA1) * gradient
        v = BETA2 * v + (1 - BETA2) * gradient**2
        scale = hparams.v_lr / (1 - BETA1 ** (step + 1))
        delta = delta - scale * m / ((v / (1 - BETA2 ** (step + 1))).sqrt() + EPS)
        norm = delta.norm(dim=1)
        delta = torch.where((norm > radius)[:, None], delta * (radius / norm)[:, None], delta)
    return Values(h0 + final, h0, first_nll, last_nll, last_loss, steps)


def _loss(
    model: Model,
    suffix: Suffix,
    rows: _Rows,
    delta: Tensor,
    p_first: Tensor | None,
    decay: Tensor,
    kl_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, log-probabilities of the KL rows) of each fact of the batch."""
    lines = torch.arange(len(rows.fact), device=delta.device)
    moved = rows.hidden.index_put((lines, rows.position), delta[rows.fact].to(rows.hidden.dtype), accumulate=True)
    read_row = torch.cat([rows.label_row, rows.kl_row])
    read_at = torch.cat([rows.label_at, rows.position[rows.kl_row]])
    logp = model.logits(suffix(moved, (read_row, read_at))).log_softmax(-1)
    labels = len(rows.label)
    of_label = -logp[:labels].gather(1, rows.label[:, None])[:, 0] * rows.label_weight
    nll = of_label.new_zeros(len(delta)).index_add(0, rows.fact[rows.label_row], of_label)
    p_now = logp[labels:]
    first = p_now.detach() if p_first is None else p_first
    kl = (p_now.exp() * (p_now - first)).sum(-1)
    return nll + kl_factor * kl + decay * _norm(delta), nll, p_now


def _norm(delta: Tensor) -> Tensor:
    """Row norms with subgradient 0 at 0 (what `torch.norm` promises; a plain square root gives NaN there)."""
    return torch.linalg.vector_norm(delta, dim=1)
