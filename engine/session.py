"""An `EditSession` holds all state of editing one model: the ordered edits and the weights they changed."""

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..kernels.dispatch import recording, using
from ..kernels.errors import InputError
from ..stats import Corpus, cache_root
from ..stats.projections import Projections, read_projections
from ..stats.ranks import ALONE, Ranks
from .decoding import continuations
from .delta import Delta, EditedWeights, Factors
from .editors.registry import Job, find_method
from .edits import Edit, Iteration, Singles, iteration_of, seconds_since
from .evaluation import evaluate
from .facts import Fact, InvalidFact, digest, to_record
from .held import Held
from .hparams import load_hparams
from .model import Model, editable
from .objective import Objective
from .passes import sample_contexts
from .phases import Listener, Phases, silent
from .prompts import check_contexts, stem
from .report import implementations, versions
from .value_store import value_folder
from .values import of_all, perplexities

log = logging.getLogger("rewire")

# what a delta tells of each edit
ABOUT = (
    *("id", "method", "preset", "hparams", "neighbors", "compat", "contexts", "seed", "statistics", "dtype"),
    *("facts_digest", "fact_count", "versions"),
)
SAID_TOKENS = 6  # how much the report quotes of what the model says


class EditSession:
    """Edits one model, in order.

    method: one of `engine.editors.names.METHODS`
    preset: a YAML file or the name of a shipped preset; None: found by the model's name
    hparams: single hyper-parameters that replace the preset's
    stats: a folder of second moments; None: the cache, else collected on the fly
    corpus: what to collect them over: a `rewire.stats.Corpus`, or what `read_corpus` takes; None: the demo's text
    projections: for AlphaEdit: published null-space projections (null_space_project.pt, or a folder of layer-{l}.pt) of
        the hyper-parameters' layers, instead of second moments and a threshold
    contexts: generated context templates, each ending in `{}`; None: sampled from the model once, with `seed`
    batch_size: facts whose values are optimised at once; None: from the free memory
    impl: "auto", "torch" or "triton": what serves the operations of `rewire.kernels`; the report names what did
    listener: called with (phase, done, total) while an edit runs
    neighbors: the facts' `edit_neighbors` enter the values, as what shall stay (they never enter keys or solves)
    compat: what the published implementations do where the default is otherwise (docs/methods.md)
    ranks: processes that each have such a session, on the same model, and edit the same facts (`stats.ranks.join`):
        they share contexts, statistics and values; the first one evaluates

    Raises `InputError` for an unknown method or hyper-parameter, and for a preset that does not fit the model.
    """

    def __init__(
        self,
        model: Model,
        method: str = "memit",
        preset: str | Path | None = None,
        stats: str | Path | None = None,
        *,
        hparams: Mapping[str, Any] | None = None,
        corpus: Corpus | str | Path | None = None,
        projections: str | Path | None = None,
        contexts: Sequence[str] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        impl: str = "auto",
        listener: Listener = silent,
        neighbors: bool = False,
        compat: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.method = find_method(method)
        self.hparams, self.preset = load_hparams(
            self.method.hparams, method, model.name, model.anatomy, preset, hparams
        )
        self.contexts = None if contexts is None else check_contexts(contexts, "contexts")
        self.seed = seed
        self.batch_size = batch_size
        self.impl = impl
        with using(impl):  # an unknown one is refused now
            pass
        self.listener = listener
        self.compat = compat
        factor = getattr(self.hparams, "nll_loss_factor", None)
        self.objective = Objective(self.method.site, factor, neighbors, compat)
        self.ranks = ranks
        self.fingerprint = model.fingerprint  # of what this session starts from
        self.edits: list[Edit] = []
        self.weights = EditedWeights(model)
        published: Projections | None = None
        if projections is not None:
            if method != "alphaedit":
                raise InputError(f"{projections}: null-space projections are AlphaEdit's; {method} takes none")
            published = read_projections(projections, self.hparams.layers, model.anatomy.d_in)
        self.held = Held(model, self.hparams, stats, corpus, published, ranks)
        self._state: Any = None  # what the method's last edit left
        self._verified: set[tuple[int, ...]] = set()

    def edit(
        self,
        facts: Sequence[Fact],
        evaluate: bool = True,
        skipped: Sequence[InvalidFact] = (),
        *,
        iterations: int = 1,
        stop_gap: float | None = None,
        watch: Callable[[Iteration], None] = lambda iteration: None,
    ) -> Edit:
        """Changes the weights so that all `facts` read as they ask; whole, or not at all.

        evaluate: measure success rates, and quote what the model says, before and after
        skipped: records that were left out, for the report
        iterations: passes, each with values and keys afresh from the weights that the last one left (arXiv 2503.11895)
        stop_gap: no further pass once |SPREAD - OPTIMIZATION| perplexity is at most this; None: all passes
        watch: called behind each pass, with the weights as it left them; of several ranks by each
        """
        facts = _checked(facts)
        if iterations < 1:
            raise InputError(f"iterations is {iterations}; expected a whole number from 1 on")
        _warn_of_contradictions(facts)
        with using(self.impl), recording() as served:
            edit, state = self._edit(facts, evaluate, skipped, served, (iterations, stop_gap, watch))
        self.edits.append(edit)
        self._state = state
        return edit

    def _edit(
        self,
        facts: tuple[Fact, ...],
        evaluate: bool,
        skipped: Sequence[InvalidFact],
        served: Counter[tuple[str, str]],
        passes: tuple[int, float | None, Callable[[Iteration], None]],
    ) -> tuple[Edit, Any]:
        editable(self.model)
        self._unchanged()
        phases = Phases(self.listener)
        self._sample(phases)
        iterations, stop_gap, watch = passes
        done: list[dict[str, Any]] = []
        state = self._state
        with self.weights.provisional() as put:  # whatever fails inside, all weights are put back
            evaluate = evaluate and self.ranks.first
            before = None
            for number in range(1, iterations + 1):
                job = self._job(facts, put, phases, state)
                if number == 1:
                    self.method.check(job)  # what can be refused is refused before the long work
                    before = self._look(facts, phases, "evaluate_before") if evaluate else None
                spent = dict(phases.seconds)
                outcome = self.method.edit(job)
                lost = put.settle()
                for layer in outcome.layers:
                    layer["lost_to_rounding"] = lost.get(layer["weight"], layer["lost_to_rounding"])
                if self.compat:  # published: a batch that is edited again counts once more
                    state = outcome.state
                with phases("spread"):  # of the first rank for all, so that all end with the same pass
                    first = self.ranks.first
                    measured = perplexities(self.model, facts, job.contexts, self.objective) if first else None
                    spread = self.ranks.same(measured) or []
                if number == 1:
                    first_nll = [result["nll_before"] for result in outcome.facts]
                now = iteration_of(number, outcome, spread, seconds_since(spent, phases.seconds))
                done.append(
                    {name: value for name, value in asdict(now).items() if name != "facts"}
                    | {"layers": outcome.layers, "values": outcome.values}
                )
                watch(now)
                if stop_gap is not None and abs(now.spread - now.optimization) <= stop_gap:
                    break
            after = self._look(facts, phases, "evaluate_after") if evaluate else None
            report = {
                **self._describe(facts),
                "implementations": implementations(served),
                "seconds": {name: round(seconds, 4) for name, seconds in phases.seconds.items()},
                "before": before and before["metrics"],
                "after": after and after["metrics"],
                "values": of_all([row["values"] for row in done]),
                "layers": outcome.layers,
                "iterations": done,
                "facts": [
                    to_record(fact)
                    | result
                    | {"nll_before": first_nll[i], "spread_ppl": spread[i]}
                    | ({"before": before["facts"][i], "after": after["facts"][i]} if before and after else {})
                    for i, (fact, result) in enumerate(zip(facts, outcome.facts, strict=True))
                ],
                "skipped": [asdict(record) for record in skipped],
            }
        keys = len(facts) * (len(done) if self.compat else 1)
        return Edit(report["id"], facts, report, keys), outcome.state

    def _unchanged(self) -> None:
        """Until its first edit: what this session starts from, and statistics are of, is the model as it is now."""
        if not self.edits and (now := self.model.fingerprint) != self.fingerprint:
            raise InputError(
                f"{self.model.name} was changed since this session began (fingerprint {self.fingerprint}, now {now}); "
                "begin a new one"
            )

    def edit_each(self, facts: Sequence[Fact]) -> Singles:
        """Each fact edited alone, as if it were the only edit of the weights as they are, all in one batch.

        Nothing is written: `rewire.evaluate(model, facts, deltas=singles.updates)` measures each fact under its own.
        Raises `InputError` as `edit`, and in a session that has edits.
        """
        if self.edits:
            raise InputError("each fact alone: this session has edits; begin a new one")
        facts = _checked(facts)
        editable(self.model)
        self._unchanged()
        phases = Phases(self.listener)
        with using(self.impl):
            self._sample(phases)
            job = self._job(facts, _refuse, phases, None)
            self.method.check(job)
            updates, told = self.method.alone(job)
        seconds = {name: round(seconds, 4) for name, seconds in phases.seconds.items()}
        return Singles(updates, {**self._describe(facts), "seconds": seconds, "facts": told})

    def _sample(self, phases: Phases) -> None:
        """Context templates, where none were given."""
        with phases("contexts"):
            if self.contexts is None:
                asked = self.hparams.context_template_length_params
                sampled = sample_contexts(self.model, self.seed, asked) if self.ranks.first else None
                self.contexts = self.ranks.same(sampled)

    def _job(self, facts: tuple[Fact, ...], put: Callable[[str, Factors], float], phases: Phases, state: Any) -> Job:
        assert self.contexts is not None
        return Job(
            self.model,
            facts,
            self.contexts,
            self.hparams,
            self.objective,
            lambda names: self.held.second_moments(names, phases, edited=bool(self.weights.sums)),
            self.held.factor,
            self.held.space,
            put,
            phases,
            state,
            self.batch_size,
            self._value_folder(self.contexts),
            self.ranks,
            self._verified,
        )

    def undo(self, identity: str) -> None:
        """Takes the last edit back: the weights are bit for bit what they were before it."""
        names = [edit.id for edit in self.edits]
        if identity not in names:
            raise InputError(f"no edit {identity!r} in this session; it has {', '.join(names) or 'none'}")
        if identity != names[-1]:
            raise InputError(f"edit {identity!r} is not the last one ({names[-1]!r} is): undo that first")
        with using(self.impl):  # the same sums to the last bit
            self.weights.undo_last()
        gone = self.edits.pop()
        self._state = self.method.forget(self._state, gone.keys)

    @property
    def delta(self) -> Delta:
        """All edits of the session as factors."""
        edits = [
            {key: edit.report[key] for key in ABOUT} | {"iterations": len(edit.report["iterations"])}
            for edit in self.edits
        ]
        return Delta(self.model.name, self.fingerprint, edits, self.weights.updates)

    def save(self, folder: str | Path) -> Path:
        """Writes `delta.safetensors`, `report.json` and `ledger.jsonl` (a line an edit) into `folder`."""
        folder = Path(folder)
        if not self.edits:
            raise InputError("nothing to save: this session has no edit")
        self.delta.save(folder)
        reports = [edit.report for edit in self.edits]
        _write(folder / "report.json", json.dumps({"edits": reports}, indent=1, ensure_ascii=False) + "\n")
        lines = [
            json.dumps(
                {key: edit.report[key] for key in ("id", "date", "method", "preset", "facts_digest")}
                | {"facts": [to_record(fact) for fact in edit.facts]},
                ensure_ascii=False,
            )
            for edit in self.edits
        ]
        _write(folder / "ledger.jsonl", "\n".join(lines) + "\n")
        return folder

    def _look(self, facts: Sequence[Fact], phases: Phases, phase: str) -> dict[str, Any]:
        """Success rates, and what the model says behind each prompt."""
        with phases(phase) as tick:
            result = evaluate(self.model, facts, progress=tick)
            said = continuations(self.model, [stem(fact.question) for fact in facts], SAID_TOKENS)
        for record, text in zip(result["facts"], said, strict=True):
            record["said"] = text
        return result

    def _value_folder(self, contexts: Sequence[str]) -> Path:
        """Where values are kept that are made of the model as it is now; of all ranks one."""
        first = self.ranks.first
        name = value_folder(self.model, contexts, self.hparams, self.objective) if first else None
        return cache_root() / "values" / str(self.ranks.same(name))

    def _describe(self, facts: Sequence[Fact]) -> dict[str, Any]:
        model = self.model
        return {
            "id": uuid.uuid4().hex[:8],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": model.name,
            "fingerprint": self.fingerprint,
            "device": str(model.device),
            "dtype": str(next(model.hf.parameters()).dtype).removeprefix("torch."),
            "method": self.method.name,
            "preset": self.preset,
            "hparams": self.hparams.model_dump(mode="json"),
            "contexts": list(self.contexts or ()),
            "neighbors": self.objective.neighbors,
            "compat": self.compat,
            "seed": self.seed,
            "facts_digest": digest(facts),
            "fact_count": len(facts),
            "statistics": dict(self.held.said),
            "versions": versions(),
        }


def _warn_of_contradictions(facts: Sequence[Fact]) -> None:
    targets: dict[str, set[str]] = {}
    for fact in facts:
        targets.setdefault(fact.question, set()).add(fact.target_new)
    twice = [question for question, asked in targets.items() if len(asked) > 1]
    if twice:
        count = "1 prompt" if len(twice) == 1 else f"{len(twice)} prompts"
        log.warning("several new objects are asked of %s (first: %r): the facts contradict, none wins", count, twice[0])


def _checked(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    found = () if isinstance(facts, (str, Fact)) else tuple(facts)
    if not found and not isinstance(facts, (str, Fact)):
        raise InputError("no facts to edit")
    if not found or not all(isinstance(fact, Fact) for fact in found):
        raise InputError("edit takes a list of rewire.Fact; rewire.read_facts(path) makes one")
    return found


def _refuse(name: str, factors: Factors) -> float:
    raise AssertionError("a fact alone writes nothing")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
