"""Target values Z: what the z-layer's block should give at each subject, optimised for many facts at once.

One variable delta a fact, added to the z-layer's output at the subject's last token of all its rows. Facts never see
each other: each has its own Adam state, stop and clamp, so a batch takes the same path as one fact alone. The blocks
up to the z-layer run once; each step runs the blocks above from the subject on (`engine.suffix`), and the head at
label rows only. Rows of all facts of a batch are sorted by length and run in groups that fit the caches (or the GPU).

Loss of a fact (MEMIT, arXiv 2210.07229, as published):
  mean over rewriting rows of mean over label tokens of -log p
  + kl_factor KL(p_now || p_first) at the subject's last token of "{} is a"
  + v_weight_decay |delta| / |h0|^2
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..kernels.target_nll import target_nll
from ..stats.collect import batches
from ..stats.memory import free_bytes
from .facts import Fact
from .hparams import Hparams
from .model import Model
from .passes import MEMORY_SHARE, blocks_until, frozen, read_at
from .prompts import PLAIN, Row, fact_rows, kl_rows, pad
from .suffix import Call, Suffix, record_calls

STOP_LOSS = 0.05
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
CPU_TOKENS = 512  # padded tokens of a group of rows: more leave the caches of a CPU (docs/benchmarks.md)
GPU_TOKENS = 16384
MAX_FACTS = 4096  # of a batch; its hidden states and variables stay in memory


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
class _Group:
    """Token rows of about one length, of any facts of the batch, and what is read where."""

    suffix: Suffix
    fact: Tensor  # [rows] which fact a row belongs to
    label_row: Tensor  # [m] row of each label
    label_at: Tensor  # [m] position that predicts it
    label: Tensor  # [m] token id
    label_weight: Tensor  # [m] 1 / (labels of its row * rewriting rows of its fact)
    kl_row: Tensor  # [k] the rows that are KL rows
    first: Tensor | None = None  # [k, d_model] what the head reads there at delta = 0

    def only(self, going: Tensor) -> "_Group":
        """Without the rows of facts that have finished; going: [facts] bool."""
        kept = going[self.fact]
        if kept.all():
            return self
        place = kept.cumsum(0) - 1
        labels, kl = kept[self.label_row], kept[self.kl_row]
        return replace(
            self,
            suffix=self.suffix.only(kept),
            fact=self.fact[kept],
            label_row=place[self.label_row[labels]],
            label_at=self.label_at[labels],
            label=self.label[labels],
            label_weight=self.label_weight[labels],
            kl_row=place[self.kl_row[kl]],
            first=None if self.first is None else self.first[kl],
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
    longest = max(len(row.ids) for group in rewriting for row in group)
    size = batch_size or facts_that_fit(model, hparams.layers[-1], longest, len(templates) + 1)
    parts: list[Values] = []
    with frozen(model):
        for start in range(0, len(facts), size):
            stop = min(start + size, len(facts))
            groups = _layout(model, hparams.layers[-1], rewriting[start:stop], kl[start:stop])
            plain = [group[0] for group in rewriting[start:stop]]
            h0 = read_at(model, plain, outputs=hparams.layers[-1:])["out", hparams.layers[-1]]

            def tick(share: float, start: int = start, stop: int = stop) -> None:
                progress(start + int(share * (stop - start)), len(facts))

            values = _optimise(model, groups, h0, hparams, tick)
            broken = (~torch.isfinite(values.loss)).nonzero()[:, 0].tolist()
            if broken:
                names = ", ".join(facts[start + i].id for i in broken)
                raise InputError(f"the loss of facts {names} is not a number; no weight was changed (lower v_lr?)")
            parts.append(values)
    return Values(*(torch.cat([getattr(part, name) for part in parts]) for name in Values.__dataclass_fields__))


def facts_that_fit(model: Model, layer: int, tokens: int, rows: int) -> int:
    """Facts of `rows` rows of `tokens` tokens whose keys, values and hidden states stay in memory."""
    config: Any = model.hf.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or model.anatomy.d_model // config.num_attention_heads
    kept = 2 * (model.anatomy.n_layers - layer - 1) * heads * width + model.anatomy.d_model  # numbers a token
    state = rows * tokens * kept * next(model.hf.parameters()).element_size()
    return max(1, min(MAX_FACTS, int(MEMORY_SHARE * free_bytes(model.device) / 2 / state)))


def group_tokens(model: Model, layer: int) -> int:
    """Padded tokens whose activations above `layer` are kept for one backward."""
    anatomy = model.anatomy
    item = next(model.hf.parameters()).element_size()
    saved = item * (anatomy.n_layers - layer - 1) * (12 * anatomy.d_model + 4 * anatomy.d_in)
    cap = GPU_TOKENS if model.device.type == "cuda" else CPU_TOKENS
    return max(1, min(cap, int(MEMORY_SHARE * free_bytes(model.device) / 2 / saved)))


def _layout(model: Model, layer: int, rewriting: Sequence[Sequence[Row]], kl: Sequence[Row]) -> list[_Group]:
    rows = [row for group in rewriting for row in group] + list(kl)
    owner = [fact for fact, group in enumerate(rewriting) for _ in group] + list(range(len(kl)))
    active = [len(row.ids) - row.position for row in rows]
    order = sorted(range(len(rows)), key=lambda i: rows[i].position)  # rows of one batch start at about one place
    recorded: dict[int, dict[int, Call]] = {}
    groups = []
    for batch in batches([active[i] for i in order], group_tokens(model, layer)):
        chosen = [order[i] for i in batch]
        ids = pad([rows[i] for i in chosen], model.device)
        longest = ids.shape[1]
        if longest not in recorded:
            recorded[longest] = record_calls(model, layer, longest)
        hidden = blocks_until(model, ids, layer)
        labels = [rows[i].labels for i in chosen]

        def put(numbers: Sequence[float], kind: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(numbers, dtype=kind, device=hidden.device)  # noqa: B023

        start = put([rows[i].position for i in chosen])
        ends = [len(rows[i].ids) for i in chosen]
        share = [len(rewriting[owner[i]]) * len(rows[i].labels) for i in chosen]
        groups.append(
            _Group(
                suffix=Suffix.of(model, recorded[longest], hidden, start, active[chosen[0]]),
                fact=put([owner[i] for i in chosen]),
                label_row=put([line for line, row in enumerate(labels) for _ in row]),
                label_at=put([at for end, row in zip(ends, labels, strict=True) for at in range(end - len(row), end)]),
                label=put([token for row in labels for token in row]),
                label_weight=put([1 / n for n, row in zip(share, labels, strict=True) for _ in row], torch.float32),
                kl_row=put([line for line, row in enumerate(labels) if not row]),
            )
        )
    return groups


def _optimise(
    model: Model, groups: list[_Group], h0: Tensor, hparams: Hparams, tick: Callable[[float], None]
) -> Values:
    radius = hparams.clamp_norm_factor * h0.norm(dim=1)
    decay = hparams.v_weight_decay / h0.norm(dim=1) ** 2
    delta, m, v = torch.zeros_like(h0), torch.zeros_like(h0), torch.zeros_like(h0)
    going = torch.ones(len(h0), dtype=torch.bool, device=h0.device)  # facts that still move
    first_nll, last_nll, last_loss = (h0.new_zeros(len(h0)) for _ in range(3))
    steps = torch.zeros(len(h0), dtype=torch.long, device=h0.device)

    for step in range(hparams.v_num_grad_steps):
        update = step < hparams.v_num_grad_steps - 1  # the last forward is only looked at
        nll, kl, gradient = h0.new_zeros(len(h0)), h0.new_zeros(len(h0)), torch.zeros_like(h0)
        for number, group in enumerate(groups):
            group = group.only(going)
            if len(group.fact):
                group = _add_loss(model, group, delta, hparams.kl_factor, update, nll, kl, gradient)
            groups[number] = group
        norm = delta.norm(dim=1)
        loss = nll + hparams.kl_factor * kl + decay * norm
        if step == 0:
            first_nll = nll.clone()
        last_nll, last_loss = torch.where(going, nll, last_nll), torch.where(going, loss, last_loss)
        going = going & (loss >= STOP_LOSS)  # false for NaN too
        tick((step + 1) / hparams.v_num_grad_steps)
        if not update or not going.any():
            break
        # |delta| has subgradient 0 at 0
        gradient = gradient + decay[:, None] * (delta / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None])
        m = BETA1 * m + (1 - BETA1) * gradient
        v = BETA2 * v + (1 - BETA2) * gradient**2
        moved = delta - hparams.v_lr / (1 - BETA1 ** (step + 1)) * m / ((v / (1 - BETA2 ** (step + 1))).sqrt() + EPS)
        norm = moved.norm(dim=1)
        moved = torch.where((norm > radius)[:, None], moved * (radius / norm)[:, None], moved)
        delta = torch.where(going[:, None], moved, delta)
        steps += going
    tick(1.0)
    return Values(h0 + delta, h0, first_nll, last_nll, last_loss, steps)


def _add_loss(
    model: Model,
    group: _Group,
    delta: Tensor,
    kl_factor: float,
    update: bool,
    nll: Tensor,
    kl: Tensor,
    gradient: Tensor,
) -> _Group:
    """Adds the group's part of each fact's nll and KL and, with `update`, of the gradient of their weighted sum.

    Returns the group with `first`, which the first call finds.
    """
    weight, bias, softcap = model.head_parts()
    with torch.set_grad_enabled(update):
        moved = delta.detach().requires_grad_(update)
        read_row = torch.cat([group.label_row, group.kl_row])
        read_position = torch.cat([group.label_at, group.suffix.start[group.kl_row]])
        hidden = group.suffix(moved, group.fact, (read_row, read_position)).to(weight.device)
        labels = len(group.label)
        first = hidden[labels:].detach().clone() if group.first is None else group.first
        of_nll, of_kl = target_nll(
            hidden,
            weight,
            group.label.to(weight.device),
            group.fact[read_row].to(weight.device),
            torch.cat([group.label_weight, torch.ones_like(group.kl_row, dtype=torch.float32)]).to(weight.device),
            len(delta),
            first=first,
            bias=bias,
            softcap=softcap,
        )
        if update:
            (found,) = torch.autograd.grad(of_nll.sum() + kl_factor * of_kl.sum(), moved)
            gradient += found
    nll += of_nll.detach().to(nll.device)
    kl += of_kl.detach().to(kl.device)
    return replace(group, first=first)
