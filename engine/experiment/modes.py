"""Experiments by mode (arXiv 2502.11177): single edits each on the clean model, one after the other, or in batches.

Of a sequence, what was edited is measured at once, all so far at checkpoints, and everything at the end; what is said
about other things is always compared with the unedited model. Run again after an interruption, edits are made again
from the values on disk, and what was measured on the same weights is not measured again.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ...stats.cache import write_whole
from ..answer_store import AnswerStore
from ..evaluation import evaluate, find_protocol
from ..evaluation.outcome import flat, write
from ..facts import Fact
from ..finite import finite
from ..judges import find_judge
from ..judges.llm import KEY_VARIABLE
from ..model import Model
from ..phases import Listener
from ..report import versions
from ..session import EditSession
from ..value_store import weights_digest
from . import names, results
from .begin import fetched, read_inputs, session_of
from .config import Experiment
from .data import facts_of
from .progress import Progress, content_digest

STEPS, CHECKPOINTS, IMMEDIATE, SINGLES = "steps.json", "checkpoints.json", "immediate.jsonl", "singles.json"
SAVE_SECONDS = 20.0  # between two saves of a sequence's steps
Row = dict[str, Any]


def run(
    experiment: Experiment, listener: Listener, tell: Callable[[Row], None], load: Callable[[str, str, str], Model]
) -> Path:
    """The folder with all results: `evaluation.outcome`'s files, and of a sequence `checkpoints.json` (all facts so
    far, behind so many edits) and `immediate.jsonl` (a row a fact, measured behind its own edit).

    tell: called with a row for the unedited model (number 0), each checkpoint, and the end
    """
    facts = facts_of(experiment)
    inputs = read_inputs(experiment)
    progress = Progress.find(experiment, facts, (), inputs.digests)
    if progress.iterations is not None:
        for row in progress.rows:
            tell(row)
        return progress.folder
    inputs = fetched(experiment, inputs)
    more: dict[str, Any] = {} if experiment.context is None else {"context": experiment.context}
    if experiment.compat and "compat" in find_protocol(experiment.protocol).options:
        more["compat"] = True
    if experiment.protocol == "wild":
        more["judge"] = find_judge(experiment.judge, model=experiment.judge_model, base_url=experiment.judge_url)
        more["judge"].prepare()
        _same_judge(progress, content_digest(more["judge"].describe()))
    model = load(names.locate(experiment.model), experiment.dtype, experiment.device)
    session = session_of(experiment, inputs, model, listener)
    progress.begin(model.fingerprint)
    _Mode(experiment, model, facts, more, progress, listener, tell).whole(session)
    return progress.folder


def _same_judge(progress: Progress, judge: str) -> None:
    """What "auto" comes to depends on a key; steps that two judges judged would not compare."""
    if progress.about.setdefault("judge", judge) != judge:
        raise InputError(
            f"{progress.folder}: begun with another judge than judge: {progress.experiment.judge} is now: set or unset "
            f"{KEY_VARIABLE} as it was, or name another --out"
        )


class _Mode:
    """One run. before: what the unedited model says; facts: those that are edited"""

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        facts: Sequence[Fact],
        more: dict[str, Any],
        progress: Progress,
        listener: Listener,
        tell: Callable[[Row], None],
    ) -> None:
        self.experiment, self.model, self.facts, self.more = experiment, model, list(facts), more
        self.progress, self.listener, self.tell = progress, listener, tell
        self.against = find_protocol(experiment.protocol).against
        self.before: dict[str, Any] = {}
        self.seconds = {"edit": 0.0, "evaluate": 0.0}
        self.sources: dict[str, Any] = {"method": experiment.name, "mode": experiment.mode, "model": experiment.model}

    def whole(self, session: EditSession) -> None:
        with AnswerStore.of(self.model) as store:
            self.before = self._measure(self.facts, "evaluate_unedited", store)
            self._only_wrong(store)
        self._row(0, self.before, len(self.facts))
        after = self._single(session) if self.experiment.mode == "single" else self._sequence(session)
        self._row(len(self.progress.steps), after, len(self.facts))
        self.sources["preset"] = session.preset
        about = {
            **self.sources,
            "fingerprint": session.fingerprint,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seconds": {name: round(seconds, 4) for name, seconds in self.seconds.items()},
            "versions": versions(),
        }
        write(self.progress.folder, self.facts, after, self.before, about)
        self.progress.finish()

    def _only_wrong(self, store: AnswerStore) -> None:
        """Facts that the unedited model answers right need no edit: left out where that is asked for."""
        if not self.experiment.only_wrong:
            return
        wrong = [not record["rewrite"][0]["right"] for record in self.before["facts"]]
        asked = len(self.facts)
        self.facts = [fact for fact, left in zip(self.facts, wrong, strict=True) if left]
        if not self.facts:
            raise InputError(f"only_wrong: the unedited model answers all {asked} facts right; nothing is left to edit")
        self.sources["asked"] = asked
        self.before = {}  # the unedited model is not compared with itself
        self.before = self._measure(self.facts, "evaluate_unedited", store)  # answers are known: metrics alone

    def _single(self, session: EditSession) -> dict[str, Any]:
        start = time.perf_counter()
        made = session.edit_each(self.facts)
        self.seconds["edit"] = time.perf_counter() - start
        results.write_json(self.progress.folder / SINGLES, made.report)
        # beside the unedited weights, whose answers stay
        with AnswerStore(AnswerStore.of(self.model).folder / "single", keep=False) as store:
            return self._measure(self.facts, "evaluate", store, made.updates)

    def _sequence(self, session: EditSession) -> dict[str, Any]:
        asked, folder = self.experiment, self.progress.folder
        size = 1 if asked.mode == "sequential" else asked.batch or len(self.facts)
        known = results.read_json(folder / STEPS) if (folder / STEPS).is_file() else []
        steps: list[dict[str, Any]] = []
        checkpoints: list[dict[str, Any]] = []
        after: dict[str, Any] = {}
        saved, so_far = time.monotonic(), 0
        for place, begin in enumerate(range(0, len(self.facts), size)):
            batch, so_far = self.facts[begin : begin + size], min(begin + size, len(self.facts))
            start = time.perf_counter()
            session.edit(batch, evaluate=False, iterations=asked.iterations, stop_gap=asked.stop_gap)
            self.seconds["edit"] += time.perf_counter() - start
            weights = weights_digest(self.model)
            there = known[place] if place < len(known) and known[place]["weights"] == weights else None
            last = so_far == len(self.facts)
            due = asked.checkpoints is not None and so_far // asked.checkpoints > begin // asked.checkpoints
            # what is asked twice is answered once
            with AnswerStore.of(self.model, keep=False, weights=weights) as store:
                step = there or {"weights": weights, "facts": so_far, "immediate": self._at_once(batch, store)}
                if last:
                    after = self._measure(self.facts, "evaluate", store)
                if due or last:
                    if "metrics" not in step:
                        step["metrics"] = (after or self._measure(self.facts[:so_far], "evaluate", store))["metrics"]
                    checkpoints.append({"after": so_far, "metrics": step["metrics"]})
                    results.write_json(folder / CHECKPOINTS, checkpoints)
                steps.append(step)
                if due or last or time.monotonic() - saved > SAVE_SECONDS:
                    results.write_json(folder / STEPS, [*steps, *known[len(steps) :]])
                    saved = time.monotonic()
            if due and not last:
                self._row(len(self.progress.steps), {"metrics": step["metrics"]}, so_far)
        rows = [finite(row) for step in steps for row in step["immediate"]]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder / IMMEDIATE, lambda file: file.write(lines.encode()))
        session.save(folder)
        return after

    def _at_once(self, batch: Sequence[Fact], store: AnswerStore) -> list[dict[str, Any]]:
        """A flat row of each of these facts, behind their own edit."""
        found = self._measure(batch, "evaluate_at_once", store)
        earlier = {record["id"]: record for record in self.before["facts"]}
        return [flat(fact, record, earlier[fact.id]) for fact, record in zip(batch, found["facts"], strict=True)]

    def _measure(
        self, facts: Sequence[Fact], phase: str, store: AnswerStore, deltas: Sequence[Any] = ()
    ) -> dict[str, Any]:
        start = time.perf_counter()
        more = self.more | ({"unedited": self.before} if self.against and self.before else {})
        found = evaluate(
            self.model,
            facts,
            self.experiment.protocol,
            None,
            lambda done, total: self.listener(phase, done, total),
            deltas=deltas,
            store=store,
            **more,
        )
        self.seconds["evaluate"] += time.perf_counter() - start
        return found

    def _row(self, number: int, measured: dict[str, Any], facts: int) -> None:
        row = {"number": number, "facts": facts, "metrics": measured["metrics"]}
        row["seconds"] = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        if number == 0 and "0" in self.progress.steps:  # of an earlier run: those behind it are measured again
            self.progress.steps = {}
        self.progress.add(number, "", row)
        self.tell(row)
