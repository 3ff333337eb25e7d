"""Rows that begin alike, read as one: their common trunk once, and behind it a branch of each, unseen by the others.

Two answers to one prompt cost little more than one: a mask keeps branches apart, and each goes on at the trunk's end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .model import Model
from .passes import before_head
from .prompts import Row

LONGEST = 512  # tokens of a tree: attention takes their square
WORTH = 256  # tokens that are saved: trying whether a model branches takes three small forwards
TOLERANCE = 1e-4  # of the largest number: what branching may change, in float32
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")  # what configs call how far attention sees
TRIAL = (7, 3, 4)  # tokens of the trunk and of the two branches that `can_branch` tries


@dataclass
class Tree:
    """One row to read.

    ids, positions: of each token; branch: which branch it is of, 0 for the trunk
    rows: number of a row -> the place of each of its tokens
    """

    ids: list[int]
    positions: list[int]
    branch: list[int]
    rows: dict[int, list[int]] = field(default_factory=dict)


def grow(rows: Sequence[Row], owner: Sequence[int] = ()) -> list[Tree]:
    """Trees that hold all rows: those of one owner with the same ids up to half of their length, or more, share one of
    up to `LONGEST` tokens."""
    apart = [(owner[i] if owner else 0, row.begins) for i, row in enumerate(rows)]  # never in one tree
    order = sorted(range(len(rows)), key=lambda i: (apart[i], rows[i].ids))
    groups: list[tuple[int, list[int]]] = []  # (tokens of the trunk, its rows)
    for i in order:
        ids = rows[i].ids
        if groups:
            trunk, members = groups[-1]
            first = members[0]
            shared = min(trunk, _common(rows[first].ids, ids))
            lengths = [len(ids), *(len(rows[j].ids) for j in members)]
            fits = sum(lengths) - len(members) * shared <= LONGEST
            if apart[first] == apart[i] and 2 * shared >= max(lengths) and shared and fits:
                groups[-1] = (shared, [*members, i])
                continue
        groups.append((len(ids), [i]))
    return [_tree(rows, trunk, members) for trunk, members in groups]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tree(rows: Sequence[Row], trunk: int, members: Sequence[int]) -> Tree:
    ids = list(rows[members[0]].ids[:trunk])
    begins = rows[members[0]].begins
    made = Tree(ids, list(range(begins, begins + trunk)), [0] * trunk)
    known: dict[tuple[int, ...], list[int]] = {(): []}
    for number in members:
        rest = rows[number].ids[trunk:]
        if rest not in known:
            known[rest] = list(range(len(made.ids), len(made.ids) + len(rest)))
            made.ids += rest
            made.positions += range(begins + trunk, begins + trunk + len(rest))
            made.branch += [len(known) - 1] * len(rest)
        made.rows[number] = [*range(trunk), *known[rest]]
    return made


def read_trees(model: Model, trees: Sequence[Tree]) -> Tensor:
    """One forward: what the head would read, [trees, longest, d_model]; the model is `passes.fused` already."""
    longest = max(len(tree.ids) for tree in trees)

    def padded(columns: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([column + [fill] * (longest - len(column)) for column in columns], device=model.device)

    more: dict[str, Any] = {}
    branched = any(tree.branch[-1] for tree in trees)
    if branched or any(tree.positions[0] for tree in trees):
        more["position_ids"] = padded([tree.positions for tree in trees], 0)
    if branched:
        branch = padded([tree.branch for tree in trees], -1)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=model.device).tril()
        apart = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        more["attention_mask"] = _as_taken(model, (causal & apart)[:, None])
    return before_head(model, padded([tree.ids for tree in trees], 0), **more)


def _as_taken(model: Model, allowed: Tensor) -> Tensor:
    """The mask as the model's attention takes one: what is allowed, or what is added to its scores."""
    if model.hf.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        return allowed
    return torch.zeros_like(allowed, dtype=model.dtype).masked_fill_(~allowed, torch.finfo(model.dtype).min)


@torch.no_grad()
def can_branch(model: Model, longest: int) -> bool:
    """Whether rows of up to `longest` tokens can be read as trees, by trying: the same as each alone.

    False where a family takes no positions, no mask of its own, or sees a window shorter than that.
    """
    config: Any = model.hf.config.get_text_config()  # type: ignore[union-attr, operator]
    windows = [getattr(config, name, None) or 2 * longest for name in WINDOWS]
    if config._attn_implementation not in ("sdpa", "eager") or min(windows) < 2 * longest:
        return False
    trunk, *branches = ([(i * 7919 + j * 104729) % model.anatomy.vocab for j in range(n)] for i, n in enumerate(TRIAL))
    rows = [Row((*trunk, *branch)) for branch in branches]
    try:
        (tree,) = grow(rows)
        together = read_trees(model, [tree])[0]
        for number, row in enumerate(rows):
            alone = read_trees(model, grow([row]))[0]
            found, wanted = together[tree.rows[number]], alone
            allowed = max(TOLERANCE, 8 * torch.finfo(model.dtype).eps) * float(wanted.abs().max())
            if not bool((found - wanted).abs().max() <= allowed):  # NaN is not
                return False
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a family says to a mask or to positions
        return False
    return True
