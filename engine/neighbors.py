"""Which facts can be edited with a neighbour's help: the neighbours of each that the unedited model knows.

Neighbour-assisted editing (UnderEdit/OverEdit, arXiv 2503.11895) tells the edit of one neighbour which object it keeps,
and judges specificity by others. Both need neighbours that the model gets right to begin with. So each fact's
neighbours are run with the true object behind them: one survives where the most probable tokens at the object's
positions are the object. The first survivor with a known subject is the edit's neighbour, the others are held out; a
fact with none of either is left out. Whether the model knows the fact itself is not asked, as published.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels.errors import InputError
from ..stats.collect import batches
from .facts import EditNeighbor, Fact, held_out
from .model import Model
from .passes import final_hidden, forward_bytes, tokens_that_fit
from .phases import Tick
from .prompts import Row, answer_rows


@dataclass(frozen=True)
class Eligible:
    """What `choose` found.

    facts: those with a neighbour for the edit (`edit_neighbors`, one) and others held out (`neighbors`)
    records: facts that were looked at; candidates: of those, the ones with a neighbour to choose from
    """

    facts: list[Fact]
    records: int
    candidates: int

    @property
    def histogram(self) -> dict[int, int]:
        """Number of held-out neighbours -> facts that have so many."""
        counts = [len(fact.neighbors) for fact in self.facts]
        return {count: counts.count(count) for count in sorted(set(counts))}

    @property
    def mean(self) -> float | None:
        """Held-out neighbours of an eligible fact."""
        return sum(len(fact.neighbors) for fact in self.facts) / len(self.facts) if self.facts else None

    @property
    def subjects_again(self) -> int:
        """Facts whose edit-time neighbour's subject is in a held-out prompt, too, with another question; they stay."""
        return sum(any(fact.edit_neighbors[0].subject in prompt for prompt in fact.neighbors) for fact in self.facts)

    @property
    def not_counted(self) -> int:
        """Held-out prompts that are another fact's edit-time question: where both are evaluated, they do not count."""
        return sum(len(fact.neighbors) for fact in self.facts) - sum(map(len, held_out(self.facts)))


def candidates(fact: Fact) -> list[EditNeighbor]:
    """The neighbours that could be the edit's: whose object is the fact's true one."""
    return [neighbor for neighbor in fact.edit_neighbors if neighbor.target == fact.target_true]


def choose(
    model: Model,
    facts: Sequence[Fact],
    batch_tokens: int | None = None,
    progress: Tick = lambda done, total: None,
) -> Eligible:
    """The facts that are eligible on `model` as it stands, each with its neighbours chosen, in order.

    facts: as `datasets.scan_candidates` gives them: `edit_neighbors` to choose from; `neighbors`, among which the
        candidates' questions may be, are held out where they survive
    batch_tokens: padded tokens of a forward; None: from the free memory

    The question of the neighbour chosen is not held out, however often it stands there (in published sets it is).
    Every distinct (question, object) runs once. Raises `InputError` for a question that is longer than the model takes.
    """
    able = [fact for fact in facts if candidates(fact)]
    asked = [list(dict.fromkeys([*(near.question for near in candidates(fact)), *fact.neighbors])) for fact in able]
    pairs = list(dict.fromkeys((q, fact.target_true or "") for fact, qs in zip(able, asked, strict=True) for q in qs))
    known = dict(zip(pairs, says(model, pairs, batch_tokens, progress), strict=True))
    chosen = []
    for fact, questions in zip(able, asked, strict=True):
        survivors = {question for question in questions if known[question, fact.target_true or ""]}
        near = next((near for near in candidates(fact) if near.question in survivors), None)
        if near is None:
            continue
        # in the record's order, behind it what only `edit_neighbors` have
        order = [*fact.neighbors, *(question for question in questions if question not in fact.neighbors)]
        held = tuple(q for q in order if q in survivors and q.strip() != near.question.strip())
        if held:
            chosen.append(replace(fact, edit_neighbors=(near,), neighbors=held))
    return Eligible(chosen, len(facts), len(able))


@torch.no_grad()
def says(
    model: Model,
    pairs: Sequence[tuple[str, str]],
    batch_tokens: int | None = None,
    progress: Tick = lambda done, total: None,
) -> list[bool]:
    """For each (prompt, object): whether the most probable tokens at the object's positions are the object.

    They are, too, where they are other tokens that spell it, spaces at its ends aside.
    """
    tokenizer = model.tokenizer
    rows = answer_rows(tokenizer, pairs)
    for (prompt, _), row in zip(pairs, rows, strict=True):
        if len(row.ids) > model.max_length:
            raise InputError(f"prompt {prompt[:60]!r}... has {len(row.ids)} tokens, the model takes {model.max_length}")
    found = [False] * len(rows)
    budget = batch_tokens or tokens_that_fit(model, forward_bytes(model) + 2 * model.anatomy.vocab)
    done = 0
    for batch in batches([len(row.ids) for row in rows], budget):
        chosen: list[Row] = [rows[i] for i in batch]
        places = [range(len(row.ids) - len(row.labels), len(row.ids)) for row in chosen]
        best = model.logits(final_hidden(model, chosen, places, budget)).argmax(-1).cpu()
        for i, ids in zip(batch, best.split([len(row.labels) for row in chosen]), strict=True):
            said = tuple(ids.tolist())
            spelled = tokenizer.decode(said, clean_up_tokenization_spaces=False).strip()
            found[i] = said == rows[i].labels or spelled == pairs[i][1].strip()
        done += len(batch)
        progress(done, len(rows))
    return found
