"""Values one after the other, each optimised on weights that hold the edits of the facts before it (ROME)."""

import time
from collections.abc import Generator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..kernels.errors import InputError
from .entry import gate
from .facts import Fact
from .hparams import Hparams
from .model import Model
from .objective import Objective
from .passes import Map, fused, in_threads, out_of_memory
from .prompts import Row, kl_rows
from .suffix import Calls
from .value_groups import Size, lay_out, size_for
from .value_steps import Table, pick, run_steps, stack
from .value_store import ValueStore, chained_keys
from .values import SAVE_SECONDS, Values, beginning, calls_for, rewriting_rows


def values_in_turn(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    objective: Objective,
    *,
    cache: Path | None = None,
    before: str = "",
) -> Generator[Values, None, None]:
    """The values of one fact at a time, as of `optimise_values`; whoever asks writes its edit before the next.

    cache: a folder of these weights, contexts, hyper-parameters and objective; before: whatever else decides what is
        written for a value. Values that are there are taken as long as the facts before them are the same, in order.
    Raises `InputError` when a loss is no number, and where the memory does not hold a fact.
    """
    keys = chained_keys(facts, before, objective.neighbors)
    width = len(objective.site) * model.anatomy.d_model
    store = cache and ValueStore(cache, width, hparams.v_num_grad_steps)
    known = store.read(keys)[0] if store else {}
    turns = _Turns(model, facts, contexts, hparams, objective)
    new: dict[str, Table] = {}
    saved = time.monotonic()

    def save() -> None:
        if store and new:
            store.add((list(new), stack(list(new.values()))), ([], {}))
            new.clear()

    try:
        with fused(model), in_threads(model.device) as in_parallel, gate(model, turns.layer, objective.site) as opened:
            for number, key in enumerate(keys):
                row = known.pop(key, None)
                cached = row is not None
                if row is None:
                    row = new[key] = {k: v.cpu() for k, v in turns.one(number, opened, in_parallel).items()}
                whole = {k: v.to(model.device) for k, v in row.items()} | {"cached": torch.tensor([cached])}
                yield Values(**{f.name: whole[f.name] for f in fields(Values) if f.name in whole}, capacity=1)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
    finally:
        save()
        if store:
            store.merge()


class _Turns:
    """What all turns share: token rows, and what blocks are called with."""

    def __init__(
        self, model: Model, facts: Sequence[Fact], contexts: Sequence[str], hparams: Hparams, objective: Objective
    ) -> None:
        self.model, self.facts, self.hparams, self.objective = model, facts, hparams, objective
        self.layer = hparams.layers[-1]
        self.rows: list[list[Row]] = rewriting_rows(model, facts, contexts, objective)
        self.kl = kl_rows(model.tokenizer, facts)
        self.longest = max(len(row.ids) for rows in (*self.rows, self.kl) for row in rows)
        self.size: Size = size_for(model, self.layer, max(map(len, self.rows)) + 1, self.longest, 1)
        self.calls: Calls = {}

    def one(self, number: int, opened: Any, in_parallel: Map) -> Table:
        """What is known of a fact in the end, a row, with the weights as they are."""
        if not self.calls:
            self.calls = calls_for(self.model, self.layer, self.longest, self.objective)
        while True:
            try:
                return self._try(number, opened, in_parallel)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            self.size = self.size.halved()

    def _try(self, number: int, opened: Any, in_parallel: Map) -> Table:
        sizes = (self.longest, self.size.tokens)
        rows, kl = [self.rows[number]], [self.kl[number]]
        groups, h0 = lay_out(self.model, self.layer, rows, kl, self.calls, *sizes, self.objective, opened)
        state = beginning(self.model, h0, self.hparams)
        for _, known, _ in run_steps(self.model, groups, state, self.hparams, in_parallel, self.objective):  # noqa: B007
            pass
        if not (torch.isfinite(known["loss"]).all() and torch.isfinite(known["Z"]).all()):
            named = self.facts[number].id
            raise InputError(f"the loss of fact {named} is not a number; no weight was changed (lower v_lr?)")
        return pick(known, [0])
