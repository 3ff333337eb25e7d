"""Teacher-forced answers, token by token: what a model finds most probable, and how probable it finds the answer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..stats.collect import batches
from .branches import WORTH, Tree, can_branch, grow, read_trees
from .model import Model
from .passes import forward_bytes, fused, tokens_that_fit
from .phases import Tick
from .prompts import Row

LARGEST_NLL = 500.0  # nats: what perplexities end at
HEAD_ROWS = 256  # positions that the head is run on at once: it makes a row of the vocabulary of each


@dataclass(frozen=True)
class Answer:
    """What a model makes of one row's labels: three tuples of the same length, a label each.

    labels: the token ids that were to be predicted
    best: the most probable token id at the position before each
    logprobs: log-probability of each label there, nats
    """

    labels: tuple[int, ...]
    best: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def share_right(self) -> float:
        """Share of the labels that are the most probable token."""
        return sum(a == b for a, b in zip(self.labels, self.best, strict=True)) / len(self.labels)

    @property
    def exact(self) -> bool:
        """Whether every label is."""
        return self.labels == self.best

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)


def perplexity(nll: float) -> float:
    """exp(nll), at most e^500: a model that broke (infinite, not a number) has one as well."""
    return math.exp(min(LARGEST_NLL, nll))  # min keeps its first argument where the other is no number


@torch.no_grad()
def token_scores(
    model: Model,
    rows: Sequence[Row],
    batch_tokens: int | None = None,
    progress: Tick = lambda done, total: None,
    *,
    owner: Sequence[int] = (),
    enter: Callable[[Sequence[int]], None] = lambda owners: None,
    batch_rows: int | None = None,
    each: Callable[[dict[int, Answer]], None] = lambda found: None,
) -> list[Answer]:
    """The answer of each row, in order. Rows that begin alike are read together (`branches`), the head runs at the
    label positions only, on `HEAD_ROWS` of them at once.

    batch_tokens: padded tokens of a forward; None: from the free memory
    owner: whose each row is; rows of several owners are not read together, and `enter` is told before each forward
        whose its rows are, -1: nobody's
    batch_rows: rows of a forward at most
    each: called with what a forward gave, by the number of the row
    """
    result: dict[int, Answer] = {}
    budget = batch_tokens or tokens_that_fit(model, forward_bytes(model))
    with fused(model):
        trees = _trees(model, rows, owner, enter)
        for batch in batches([len(tree.ids) for tree in trees], budget):
            for start in range(0, len(batch), batch_rows or len(batch)):
                chosen = [trees[i] for i in batch[start : start + (batch_rows or len(batch))]]
                if owner:
                    enter([owner[next(iter(tree.rows))] for tree in chosen])
                found = _read(model, rows, chosen)
                each(found)
                result |= found
                progress(len(result), len(rows))
    return [result[i] for i in range(len(rows))]


def _trees(
    model: Model, rows: Sequence[Row], owner: Sequence[int], enter: Callable[[Sequence[int]], None]
) -> list[Tree]:
    grown = grow(rows, owner)
    saved = sum(len(row.ids) for row in rows) - sum(len(tree.ids) for tree in grown)
    branched = [tree for tree in grown if tree.branch[-1]]
    if branched and owner:
        enter([-1])  # a trial is one row, of the weights as they are
    if branched and (saved < WORTH or not can_branch(model, max(len(tree.ids) for tree in branched))):
        alone = [tree for tree in grown if not tree.branch[-1]]
        for tree in branched:
            for number in tree.rows:
                (one,) = grow([rows[number]])
                alone.append(replace(one, rows={number: one.rows[0]}))
        return alone
    return grown


def _read(model: Model, rows: Sequence[Row], trees: Sequence[Tree]) -> dict[int, Answer]:
    """The answers of the rows of some trees, from one forward."""
    hidden = read_trees(model, trees)
    numbers = [(line, number, at) for line, tree in enumerate(trees) for number, at in tree.rows.items()]
    places = [(line, place) for line, number, at in numbers for place in at[len(at) - len(rows[number].labels) :]]
    wanted = torch.tensor([label for _, number, _ in numbers for label in rows[number].labels], device=hidden.device)
    lines, columns = torch.tensor(places, device=hidden.device).T
    best: list[int] = []
    logprobs: list[float] = []
    for part, labels in zip(hidden[lines, columns].split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True):
        logits = model.logits(part)
        best += logits.argmax(-1).tolist()
        logprobs += logits.log_softmax(-1).gather(1, labels.to(logits.device)[:, None])[:, 0].tolist()
    found: dict[int, Answer] = {}
    start = 0
    for _, number, _ in numbers:
        stop = start + len(rows[number].labels)
        found[number] = Answer(rows[number].labels, tuple(best[start:stop]), tuple(logprobs[start:stop]))
        start = stop
    return found


def score(
    model: Model,
    rows: Sequence[Row],
    batch_tokens: int | None = None,
    progress: Tick = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """(mean log-probability of each row's labels: [rows] float64, whether all are the most probable: [rows] bool), on
    the CPU."""
    found = token_scores(model, rows, batch_tokens, progress)
    means = torch.tensor([answer.mean_logprob for answer in found], dtype=torch.float64)
    return means, torch.tensor([answer.exact for answer in found], dtype=torch.bool)
