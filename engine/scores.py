"""Teacher-forced answers, token by token: what a model finds most probable, and how probable it finds the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..stats.collect import batches
from .model import Model
from .passes import final_hidden, forward_bytes, tokens_that_fit
from .phases import Tick
from .prompts import Row, answer_rows

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
) -> list[Answer]:
    """The answer of each row, in order. The head runs at the label positions only, on `HEAD_ROWS` of them at once.

    batch_tokens: padded tokens of a forward; None: from the free memory
    """
    result: dict[int, Answer] = {}
    budget = batch_tokens or tokens_that_fit(model, forward_bytes(model))
    for batch in batches([len(row.ids) for row in rows], budget):
        chosen = [rows[i] for i in batch]
        places = [range(len(row.ids) - len(row.labels), len(row.ids)) for row in chosen]
        hidden = final_hidden(model, chosen, places, budget)
        labels = torch.tensor([label for row in chosen for label in row.labels], device=hidden.device)
        best: list[int] = []
        logprobs: list[float] = []
        for part, wanted in zip(hidden.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True):
            logits = model.logits(part)
            best += logits.argmax(-1).tolist()
            logprobs += logits.log_softmax(-1).gather(1, wanted.to(logits.device)[:, None])[:, 0].tolist()
        start = 0
        for i, row in zip(batch, chosen, strict=True):
            stop = start + len(row.labels)
            result[i] = Answer(row.labels, tuple(best[start:stop]), tuple(logprobs[start:stop]))
            start = stop
        progress(len(result), len(rows))
    return [result[i] for i in range(len(rows))]


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


def answers(
    model: Model, pairs: Sequence[tuple[str, str]], batch_tokens: int | None, progress: Tick
) -> dict[tuple[str, str], Answer]:
    """The answer to each (prompt, object) pair; one that is asked several times runs once.

    Raises `InputError` for a pair that is longer than the model's longest row.
    """
    distinct = list(dict.fromkeys(pairs))
    rows = answer_rows(model.tokenizer, distinct)
    for (prompt, _), row in zip(distinct, rows, strict=True):
        if len(row.ids) > model.max_length:
            raise InputError(f"prompt {prompt[:60]!r}... has {len(row.ids)} tokens, the model takes {model.max_length}")
    return dict(zip(distinct, token_scores(model, rows, batch_tokens, progress), strict=True))
