"""Target values Z: what the z-layer's block should give at each subject, optimised for many facts at once.

One variable delta a fact, added to the z-layer's output at the subject's last token of all its rows. Facts never see
each other: each has its own step, Adam state, stop and clamp, so a batch takes the same path as one fact alone. The
blocks up to the z-layer run once; each step runs the blocks above from the subject on (`engine.suffix`), and the head
at label rows only.

Facts come in an order by the shape of their rows, and are worked on in rounds: so many are in flight, those that are
done leave at once, and when few are left, waiting ones take the free places and all are laid out anew. So what a run
does depends on nothing but its facts: killed and started again, it goes on from the last round to the same bits. (From
the middle of a round, which is kept each minute and when it is interrupted, to rounding: others are beside it then.)
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..stats.ranks import ALONE, Ranks
from .entry import Gate, gate, runs_inside
from .facts import Fact
from .hparams import Hparams
from .model import Model
from .objective import MEMIT, Objective
from .passes import Map, fused, in_threads, out_of_memory
from .prompts import PLAIN, Row, fact_rows, kl_rows, neighbor_rows
from .scores import perplexity, score
from .suffix import Calls, record_calls
from .value_groups import lay_out, size_for
from .value_steps import STOP_LOSS as STOP_LOSS
from .value_steps import Table, fresh, pick, run_steps, stack
from .value_store import ValueStore, fact_key

log = logging.getLogger("rewire")

SAVE_SECONDS = 60.0  # a longer round is put on disk so often on the way
# of the facts in flight, those that are left when a round ends: what is carried over is laid out again, which costs a
# fact some 2 steps; groups of so few facts are still about full
LEFT = 8
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Values:
    """Z and how each fact's optimisation went; all on the model's device.

    Z: [n, variables * d_model] float32, h0 + delta
    h0: as Z, what is there at the subject on the plain prompt (of MEMIT the z-layer's output)
    first_nll, last_nll: [n] mean negative log-likelihood of the target before, and with delta, in nats
    loss: [n] the last loss
    steps: [n] int64, Adam updates made
    losses: [n, v_num_grad_steps] float32, the loss at each forward, NaN behind the last
    cached: [n] bool, came from disk
    capacity: facts in flight at once, 1 where they come in turn; 0: none had to be optimised
    """

    Z: Tensor
    h0: Tensor
    first_nll: Tensor
    last_nll: Tensor
    loss: Tensor
    steps: Tensor
    losses: Tensor
    cached: Tensor
    capacity: int


def merged(found: Sequence[Values]) -> Values:
    """All of them, one below the other."""
    columns = {f.name: torch.cat([getattr(values, f.name) for values in found]) for f in fields(Values)[:-1]}
    return Values(**columns, capacity=max(values.capacity for values in found))


def fact_columns(values: Values) -> dict[str, list[Any]]:
    """What a report says of each fact's optimisation: column -> a number, or a list, a fact."""
    norm, size = (values.Z - values.h0).norm(dim=1), values.h0.norm(dim=1)
    return {
        "steps": values.steps.tolist(),
        "nll_before": values.first_nll.tolist(),
        "nll_with_delta": values.last_nll.tolist(),
        "probability_with_delta": (-values.last_nll).exp().tolist(),
        "loss": values.loss.tolist(),
        "losses": [
            [float(f"{loss:.4g}") for loss in row[: made + 1]]
            for row, made in zip(values.losses.tolist(), values.steps.tolist(), strict=True)
        ],
        "delta_norm": norm.tolist(),
        "relative_delta_norm": (norm / size).tolist(),
        "cached": values.cached.tolist(),
    }


def summary(values: Values, seconds: float) -> dict[str, Any]:
    """What a report says of all facts together; seconds: that the values took, cached ones among them."""
    facts, cached = len(values.steps), int(values.cached.sum())
    return {
        "facts": facts,
        "optimised": facts - cached,
        "cached": cached,
        "seconds": round(seconds, 4),
        "facts_per_second": (facts - cached) / seconds if seconds else None,
        "mean_steps": float(values.steps.double().mean()),
        "capacity": values.capacity,
    }


def of_all(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a report says of several passes together, from their summaries."""
    optimised, cached = (sum(one[name] for one in passes) for name in ("optimised", "cached"))
    seconds = sum(one["seconds"] for one in passes)
    return {
        "facts": passes[0]["facts"],
        "optimised": optimised,
        "cached": cached,
        "seconds": round(seconds, 4),
        "facts_per_second": optimised / seconds if seconds else None,
        "mean_steps": sum(one["mean_steps"] for one in passes) / len(passes),
        "capacity": max(one["capacity"] for one in passes),
    }


def optimise_values(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    hparams: Hparams,
    batch_size: int | None = None,
    progress: Progress = lambda done, total: None,
    *,
    cache: Path | None = None,
    ranks: Ranks = ALONE,
    objective: Objective = MEMIT,
) -> Values:
    """Target values of all facts; facts that ask for the same are optimised once.

    contexts: generated context templates; the plain one is added in front
    objective: where the variables are, and what the loss counts
    batch_size: facts in flight at once; None: as many as the free memory holds, and are of use
    progress: called with (facts done, cached ones among them, facts in all); those under way count by their steps
    cache: a folder of these weights, contexts and hyper-parameters (named by `value_store.value_folder`): what is
        there is taken, what is made comes there as it is made; None: nothing is read or written
    ranks: the processes that share the facts; each has all values in the end
    Raises `InputError` when a loss is no number (the model, or the learning rate, is broken), and where the memory does
    not hold one fact.
    """
    keys = [fact_key(fact, objective.neighbors) for fact in facts]
    unique: dict[str, Fact] = {}
    for key, fact in zip(keys, facts, strict=True):
        unique.setdefault(key, fact)
    asked = (list(unique.values()), list(unique), contexts, hparams, objective)
    run = _Run(model, *asked, batch_size, progress, cache, ranks)
    found = run.whole()
    place = {key: number for number, key in enumerate(unique)}
    table = pick(found, [place[key] for key in keys])
    columns = {field.name: table[field.name].to(model.device) for field in fields(Values) if field.name in table}
    return Values(**columns, capacity=run.capacity)


def rewriting_rows(
    model: Model, facts: Sequence[Fact], contexts: Sequence[str], objective: Objective
) -> list[list[Row]]:
    """Of each fact the rows whose likelihood counts: the plain one first, its contexts', its neighbours'."""
    rows = fact_rows(model.tokenizer, facts, (PLAIN, *contexts), model.max_length)
    if objective.neighbors:  # published: under the first generated template alone
        others = neighbor_rows(model.tokenizer, facts, (*contexts, PLAIN)[0], model.max_length)
        rows = [own + held for own, held in zip(rows, others, strict=True)]
    return rows


def perplexities(model: Model, facts: Sequence[Fact], contexts: Sequence[str], objective: Objective) -> list[float]:
    """Of each fact exp(nll) over its rewriting rows with the weights as they are, nll as in the values' loss."""
    rows = rewriting_rows(model, facts, contexts, objective)
    logprob, _ = score(model, [row for of in rows for row in of])
    found, at = [], 0
    for of in rows:
        labels = torch.tensor([len(row.labels) for row in of], dtype=torch.float64)
        share = labels / labels[0] if objective.compat else torch.ones_like(labels)
        found.append(perplexity(float((-logprob[at : at + len(of)] * share).mean())))
        at += len(of)
    return found


def calls_for(model: Model, layer: int, length: int, objective: Objective) -> Calls:
    """What the blocks above the layer are called with, and its own where variables are inside it."""
    inside = runs_inside(model.anatomy, objective.site)
    return record_calls(model, layer - 1 if inside else layer, length)


def beginning(model: Model, h0: Tensor, hparams: Hparams) -> Table:
    return fresh(h0, model.head_parts()[0].dtype, hparams.v_num_grad_steps, model.anatomy.d_model)


class _Run:
    """One call of `optimise_values`, on one of its ranks; facts are their numbers in it.

    order: all facts, by the shape of their rows; mine: this rank's, in that order
    done: fact -> what is known of it; flying: fact -> its state, between rounds (rows of tables on the CPU)
    """

    def __init__(
        self,
        model: Model,
        facts: Sequence[Fact],
        keys: Sequence[str],
        contexts: Sequence[str],
        hparams: Hparams,
        objective: Objective,
        batch_size: int | None,
        progress: Progress,
        cache: Path | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.facts, self.keys, self.hparams, self.objective = model, facts, keys, hparams, objective
        self.progress, self.ranks = progress, ranks
        self.z_layer = hparams.layers[-1]
        self.rewriting = rewriting_rows(model, facts, contexts, objective)
        self.kl = kl_rows(model.tokenizer, facts)
        self.longest = max(len(row.ids) for rows in (*self.rewriting, self.kl) for row in rows)
        self.order = sorted(range(len(facts)), key=self._shape)
        self.place = {fact: at for at, fact in enumerate(self.order)}
        self.mine = self.order[ranks.rank :: ranks.world]
        rows = max(map(len, self.rewriting)) + 1
        self.size = size_for(model, self.z_layer, rows, self.longest, batch_size)
        self.in_parallel: Map = map
        self.capacity, self.said, self.said_of_memory = 0, -1, False
        self.total = len(facts)
        width = len(objective.site) * model.anatomy.d_model
        self.store = cache and ValueStore(cache, width, hparams.v_num_grad_steps)
        self.done: dict[int, Table] = {}
        self.flying: dict[int, Table] = {}
        self.saved: set[int] = set()  # facts that this run has put on disk
        self.latest: tuple[list[int], Tensor, Table, Table] | None = None  # of the round under way, its last step
        if self.store:
            number = {keys[fact]: fact for fact in self.mine}
            done, states = self.store.read(list(number))
            self.done = {number[key]: row | {"cached": torch.ones(1, dtype=torch.bool)} for key, row in done.items()}
            self.flying = {number[key]: row for key, row in states.items()}
            if len(self.done) < len(self.mine) and (self.done or self.flying):
                log.warning("values: %d of %d are on disk; going on with the others", len(self.done), len(self.mine))

    def _shape(self, fact: int) -> tuple[int, int, int]:
        """Facts that are in flight together have rows of like lengths; the longest come first."""
        active = max(len(row.ids) - row.position for row in self.rewriting[fact])
        return -active, -max(len(row.ids) for row in self.rewriting[fact]), fact

    def whole(self) -> Table:
        """What is known of all facts, in their order, on every rank.

        An error is raised at once, on its rank alone: torchrun ends the others, which have their rounds on disk.
        """
        self._work()
        own = stack([self.done[fact] for fact in self.mine]) if self.mine else {}
        self.done.clear()
        self.capacity = max(self.ranks.gather(self.capacity))
        names = max(self.ranks.gather(list(own)), key=len)  # more ranks than facts: some have none
        dealt = [fact for rank in range(self.ranks.world) for fact in self.order[rank :: self.ranks.world]]
        back = torch.tensor(dealt).argsort()
        whole = {name: torch.cat(self.ranks.share(own.pop(name, None)))[back] for name in names}
        if self.store and self.ranks.first:
            self.store.merge()
        return whole

    def _work(self) -> None:
        waiting = [fact for fact in self.mine if fact not in self.done and fact not in self.flying]
        self._say(len(self.done))
        if not waiting and not self.flying:
            return
        try:
            with fused(self.model), in_threads(self.model.device) as self.in_parallel:
                calls = calls_for(self.model, self.z_layer, self.longest, self.objective)
                while waiting or self.flying:
                    carried = sorted(self.flying, key=self.place.__getitem__)[: self.size.facts]
                    room = self.size.facts - len(carried)
                    chosen = sorted([*carried, *waiting[:room]], key=self.place.__getitem__)
                    leave = self.size.facts // LEFT if waiting[room:] else 0
                    if self._round_that_fits(chosen, leave, calls):
                        waiting = waiting[room:]
                    else:
                        self.size = self.size.halved()
        except KeyboardInterrupt:
            self._interrupted()
            raise

    def _round_that_fits(self, chosen: list[int], leave: int, calls: Calls) -> bool:
        """Whether there was enough memory; where not, everything is as before."""
        try:
            made = self._round(chosen, leave, calls)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            said = log.info if self.said_of_memory else log.warning
            said("out of memory with %d facts in flight: going on with half as many", self.size.facts)
            self.said_of_memory = True
            made = None
        # the error held what was on the device
        if made is None:
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            return False
        self.capacity = max(self.capacity, len(chosen))
        self._keep(chosen, *made)
        return True

    def _round(self, chosen: list[int], leave: int, calls: Calls) -> tuple[Tensor, Table, Table]:
        rewriting, kl = [self.rewriting[fact] for fact in chosen], [self.kl[fact] for fact in chosen]
        with gate(self.model, self.z_layer, self.objective.site) as opened:
            return self._through(opened, chosen, leave, rewriting, kl, calls)

    def _through(
        self,
        opened: Gate | None,
        chosen: list[int],
        leave: int,
        rewriting: list[list[Row]],
        kl: list[Row],
        calls: Calls,
    ) -> tuple[Tensor, Table, Table]:
        sizes = (self.longest, self.size.tokens)
        groups, h0 = lay_out(self.model, self.z_layer, rewriting, kl, calls, *sizes, self.objective, opened)
        state = beginning(self.model, h0, self.hparams)
        rows = [row for row, fact in enumerate(chosen) if fact in self.flying]
        if rows:
            carried = stack([self.flying[chosen[row]] for row in rows])
            for name, column in state.items():
                column[rows] = carried[name].to(column.device)
        others, saved = len(self.done), time.monotonic()
        self.latest = None
        for found in run_steps(self.model, groups, state, self.hparams, self.in_parallel, self.objective):
            self.latest = chosen, *found
            done, _, now = found
            shares = torch.where(done, 1.0, now["step"] / self.hparams.v_num_grad_steps)
            self._say(others + float(shares.sum()))
            if int((~done).sum()) <= leave:
                break
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(*self.latest)
                saved = time.monotonic()
        return found

    def _interrupted(self) -> None:
        """Keeps what the round that was under way has, and says how much there is."""
        if self.store:
            if self.latest is not None:
                self._save(*self.latest)
            if self.store.writable:
                there = len(self.saved | self.done.keys())
                log.warning("%d of %d values are on disk, and how far others are", there, len(self.mine))

    def _save(self, chosen: list[int], done: Tensor, known: Table, state: Table) -> None:
        """Puts on disk what a round has so far; what has a loss that is no number, or such a state, is left out."""
        if not self.store:
            return
        good = torch.isfinite(known["loss"]) & torch.isfinite(known["Z"]).all(1)
        sound = torch.stack([torch.isfinite(state[name]).all(1) for name in ("delta", "m", "v")]).all(0)
        finished, going = ((mask & whole).nonzero()[:, 0].tolist() for mask, whole in ((done, good), (~done, sound)))
        finished = [row for row in finished if chosen[row] not in self.saved]
        parts = ((finished, known), (going, state))
        self.store.add(*(([self.keys[chosen[row]] for row in rows], pick(of, rows)) for rows, of in parts))
        self.saved.update(chosen[row] for row in finished)

    def _keep(self, chosen: list[int], done: Tensor, known: Table, state: Table) -> None:
        """Puts a round's results away. Raises `InputError` for a loss that is no number; the others are kept then."""
        done, known, state = done.cpu(), {k: v.cpu() for k, v in known.items()}, {k: v.cpu() for k, v in state.items()}
        self._save(chosen, done, known, state)
        good = torch.isfinite(known["loss"]) & torch.isfinite(known["Z"]).all(1)
        finished, going, broken = (mask.nonzero()[:, 0].tolist() for mask in (done & good, ~done, done & ~good))
        for row in finished:
            self.flying.pop(chosen[row], None)
            self.done[chosen[row]] = pick(known, [row]) | {"cached": torch.zeros(1, dtype=torch.bool)}
        for row in going:
            self.flying[chosen[row]] = pick(state, [row])
        if broken:
            names = ", ".join(self.facts[chosen[row]].id for row in broken)
            raise InputError(f"the loss of facts {names} is not a number; no weight was changed (lower v_lr?)")
        self._say(len(self.done))

    def _say(self, done: float) -> None:
        """Progress of all ranks, as this one's; never back, where a round is done again."""
        share = done / len(self.mine) if self.mine else 1.0
        now = int(share * self.total + 1e-6)
        if now > self.said:
            self.said = now
            self.progress(now, self.total)
