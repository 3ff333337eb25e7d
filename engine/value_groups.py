"""Facts in flight, laid out: token rows of about one shape in groups, and the memory that they take.

A group is what one forward and backward runs over. Its size bounds the saved activations; the frozen keys and values
of the tokens before the subjects, and the hidden states behind them, are kept for all facts in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..stats.memory import free_bytes
from .anatomy import Anatomy
from .entry import Gate, see
from .model import Model
from .objective import ATTENTION, MEMIT, MLP, Objective
from .passes import MEMORY_SHARE
from .prompts import Row, pad
from .suffix import Calls, Suffix

CPU_TOKENS = 512  # padded active tokens of a group: more leave the caches of a CPU (docs/benchmarks.md)
GPU_TOKENS = 16384
CPU_FACTS = 64  # in flight where nobody asks for another number: groups are full, more only cost progress
GPU_FACTS = 512
USUAL_STEPS = 12  # that a row's layout is worth: it says what padding costs
CPU_GROUP_COST = 32  # active tokens that one more group is worth: each reads the weights again
GPU_GROUP_COST = 256


@dataclass(frozen=True)
class Size:
    """facts: in flight at once; tokens: padded active tokens of a group, at most (at least one row)."""

    facts: int
    tokens: int

    def halved(self) -> "Size":
        """For less memory. Raises `InputError` where there is nothing to halve."""
        if self.facts == self.tokens == 1:
            raise InputError(
                "out of memory while the value of a single fact is optimised; expected room for its token rows: try "
                "--dtype bfloat16, shorter context templates (--contexts), or a device with more memory"
            )
        return Size(max(1, self.facts // 2), max(1, self.tokens // 2))


def fact_bytes(anatomy: Anatomy, config: Any, z_layer: int, rows: int, tokens: int, itemsize: int) -> int:
    """What a fact in flight keeps: hidden states, keys and values of `rows` rows of `tokens` tokens, and its state.

    config: the model's text config; itemsize: bytes of a number of the model's dtype
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or anatomy.d_model // config.num_attention_heads
    kept = 2 * (anatomy.n_layers - z_layer - 1) * heads * width + anatomy.d_model  # numbers a token
    return rows * tokens * kept * itemsize + 8 * 4 * anatomy.d_model


def token_bytes(anatomy: Anatomy, z_layer: int, itemsize: int) -> int:
    """Activations that an active token of a group keeps for the backward."""
    above = anatomy.n_layers - z_layer - 1
    return max(1, above) * (12 * anatomy.d_model + 4 * anatomy.d_in) * itemsize


def size_for(model: Model, z_layer: int, rows: int, tokens: int, facts: int | None = None) -> Size:
    """As the free memory allows, for facts of `rows` rows of `tokens` tokens at most; facts: in flight, as asked."""
    config: Any = model.hf.config.get_text_config()  # type: ignore[union-attr, operator]
    item = next(model.hf.parameters()).element_size()
    of_fact = fact_bytes(model.anatomy, config, z_layer, rows, tokens, item)
    size = size_within(
        int(MEMORY_SHARE * free_bytes(model.device)), model.device, of_fact, token_bytes(model.anatomy, z_layer, item)
    )
    return Size(facts or size.facts, size.tokens)


def size_within(room: int, device: torch.device, fact: int, token: int) -> Size:
    """What `room` bytes hold: half of them facts in flight, half active tokens of a group, each of so many bytes.

    Powers of two: what is free differs a little from run to run, and the same layout gives the same last bits.
    """
    gpu = device.type == "cuda"

    def fit(each: int, cap: int) -> int:
        return min(cap, 1 << max(0, (room // 2 // each).bit_length() - 1))

    return Size(fit(fact, GPU_FACTS if gpu else CPU_FACTS), fit(token, GPU_TOKENS if gpu else CPU_TOKENS))


@dataclass(frozen=True)
class Group:
    """Token rows of about one shape, of any facts in flight, and what is read where."""

    suffix: Suffix
    fact: Tensor  # [rows] which fact a row belongs to
    label_row: Tensor  # [m] row of each label
    label_at: Tensor  # [m] position that predicts it
    label: Tensor  # [m] token id
    label_weight: Tensor  # [m] 1 / (labels of its row * rewriting rows of its fact)
    kl_row: Tensor  # [k] the rows that are KL rows

    def only(self, facts: Tensor) -> "Group":
        """The rows of some facts; facts: [facts in flight] bool."""
        kept = facts[self.fact]
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
        )


def lay_out(
    model: Model,
    layer: int,
    rewriting: Sequence[Sequence[Row]],
    kl: Sequence[Row],
    calls: Calls,
    recorded: int,
    tokens: int,
    objective: Objective = MEMIT,
    gate: Gate | None = None,
) -> tuple[list[Group], Tensor]:
    """Groups of the rows of all facts, and h0: [facts, variables * d_model] float32, what is there on each plain row.

    rewriting: of each fact, the plain row first; kl: one a fact; tokens: padded active tokens of a group
    calls: of the blocks above the layer (and of its own, where there is a gate), recorded for a row of `recorded`
        tokens, at least the longest; gate: of the objective's site, open
    """
    rows = [row for group in rewriting for row in group] + list(kl)
    owner = [fact for fact, group in enumerate(rewriting) for _ in group] + list(range(len(kl)))
    plain = {id(group[0]): fact for fact, group in enumerate(rewriting)}
    extra = GPU_GROUP_COST if model.device.type == "cuda" else CPU_GROUP_COST
    shapes = [(row.position, len(row.ids) - row.position) for row in rows]
    above: Calls = {block: call for block, call in calls.items() if block > layer}
    asked = (MLP, ATTENTION) if gate else objective.site
    groups = []
    h0: Tensor | None = None
    for chosen in partition(shapes, tokens, layer + 1, model.anatomy.n_layers - layer - 1, extra):
        ids = pad([rows[i] for i in chosen], model.device)
        seen = see(model, ids, layer, asked)
        hidden = seen.output
        labels = [rows[i].labels for i in chosen]

        def put(numbers: Sequence[float], kind: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(numbers, dtype=kind, device=hidden.device)  # noqa: B023

        start = put([rows[i].position for i in chosen])
        ends = [len(rows[i].ids) for i in chosen]
        counted = [rewriting[owner[i]][0] if objective.compat else rows[i] for i in chosen]
        share = [len(rewriting[owner[i]]) * len(row.labels) for i, row in zip(chosen, counted, strict=True)]
        there = [seen.given.get(part, hidden) for part in objective.site]
        if h0 is None:
            h0 = hidden.new_zeros(len(rewriting), len(there) * hidden.shape[2], dtype=torch.float32)
        lines = [line for line, i in enumerate(chosen) if id(rows[i]) in plain]
        if lines:
            at_subject = [of.to(hidden.device)[put(lines), start[put(lines)]].float() for of in there]
            h0[put([owner[chosen[line]] for line in lines])] = torch.cat(at_subject, 1)
        suffix = Suffix.of(model, above, hidden, start, max(shapes[i][1] for i in chosen), recorded)
        groups.append(
            Group(
                suffix=suffix if gate is None else suffix.inside(gate, seen, layer, calls[layer], recorded),
                fact=put([owner[i] for i in chosen]),
                label_row=put([line for line, row in enumerate(labels) for _ in row]),
                label_at=put([at for end, row in zip(ends, labels, strict=True) for at in range(end - len(row), end)]),
                label=put([token for row in labels for token in row]),
                label_weight=put([1 / n for n, row in zip(share, labels, strict=True) for _ in row], torch.float32),
                kl_row=put([line for line, row in enumerate(labels) if not row]),
            )
        )
    assert h0 is not None
    return groups, h0


def partition(
    shapes: Sequence[tuple[int, int]], tokens: int, below: int, above: int, group_cost: int
) -> list[list[int]]:
    """Indices of rows in groups of at most `tokens` padded active tokens (at least one row), so that padding and the
    number of groups together cost least.

    shapes: (start, active tokens) of each row; below, above: blocks that run once over all tokens, and those that run
    once over the tokens before the start and each step over the active ones; group_cost: in active tokens
    """
    # in turn with starts rising and falling, so that where one number of active tokens ends, the next begins alike
    order = sorted(range(len(shapes)), key=lambda i: (shapes[i][1], shapes[i][0] * (-1) ** shapes[i][1], i))
    start, active = (np.array([shapes[i][part] for i in order]) for part in (0, 1))
    step = 2 * USUAL_STEPS * above
    widest_start, longest = start.copy(), start + active  # of rows i to the one that is looked at
    best, cut = np.zeros(len(order) + 1), np.zeros(len(order), dtype=int)
    for last in range(len(order)):
        low = max(0, last + 1 - max(1, tokens // int(active[last])))
        span = slice(low, last + 1)
        np.maximum(widest_start[span], start[last], out=widest_start[span])
        np.maximum(longest[span], start[last] + active[last], out=longest[span])
        token = below * longest[span] + above * widest_start[span] + step * active[last]
        cost = best[span] + np.arange(last + 1 - low, 0, -1) * token + group_cost * step
        at = int(cost.argmin())
        best[last + 1], cut[last] = cost[at], low + at
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end - 1] : end])
        end = int(cut[end - 1])
    return groups
