"""Running an experiment: edit, measure behind each iteration (or batch), write, sum up; killed, it goes on.

Editing is deterministic and target values are kept on disk by the weights that they were made of, so a run that is
started again makes the same weights again without optimising, and measures only where nothing was measured yet. To the
same bits, that is; a run that was killed within a round of values (`engine.values`) repeats them to rounding.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ... import __version__
from ...kernels.errors import InputError
from ...stats import cache_root
from ..asked import mean
from ..edits import Iteration
from ..evaluation import evaluate, underedit
from ..facts import Fact, to_record
from ..model import Model
from ..model import load as load_model
from ..phases import Listener, silent
from ..session import EditSession
from ..statistics import encode
from ..value_store import weights_digest
from . import modes, names, plots, results, summary
from .begin import check, fetched, read_inputs, session_of
from .config import Experiment
from .data import TEXTS, facts_of, texts_of
from .progress import PROGRESS, Progress, content_digest

log = logging.getLogger("rewire")

# of a step: number, facts, metrics, seconds; of 0 also texts, of others initial, optimization, spread, and of a batch
# iterations, how many it took
Row = dict[str, Any]
Loader = Callable[[str, str, str], Model]  # (name, dtype, device)
RETENTION = "retention.json"
EVALUATE = "evaluate"  # the phase that a listener hears of
EDIT = ("values", "keys", "solve", "apply")  # the phases whose time is that of an edit, as published


def run(
    experiment: Experiment,
    listener: Listener = silent,
    tell: Callable[[Row], None] = lambda row: None,
    load: Loader = lambda name, dtype, device: load_model(name, dtype, device=device),
) -> Path:
    """The folder with all results. Finished already, nothing is done; interrupted, the same call goes on.

    tell: called with each step's row as it is measured (0: the unedited model), or found to be
    load: what loads the model

    Raises `InputError` for what is wrong in the input, and for a folder that holds another experiment; what can be
    known without the model is known before it is loaded.
    """
    check(experiment)
    if experiment.mode is not None:
        return modes.run(experiment, listener, tell, load)
    facts, texts = facts_of(experiment), texts_of(experiment)
    inputs = read_inputs(experiment)
    progress = Progress.find(experiment, facts, texts, inputs.digests)
    if progress.iterations is not None:
        for row in progress.rows:
            tell(row)
        return progress.folder
    inputs = fetched(experiment, inputs)
    if not texts:
        log.warning("%s is not there: no ME-PPL is measured (--perplexity names texts)", experiment.data_dir / TEXTS)
    model = load(names.locate(experiment.model), experiment.dtype, experiment.device)
    session = session_of(experiment, inputs, model, listener)
    progress.begin(model.fingerprint)
    _Run(experiment, model, facts, texts, progress, listener, tell).whole(session)
    return progress.folder


def summarize(experiment: Experiment) -> tuple[Path, list[Row]]:
    """The folder, its results summed up again, and a row a step; nothing is edited, and results may be published ones.

    Raises `InputError` where there are none.
    """
    if experiment.mode is not None:
        raise InputError(f"mode {experiment.mode} is summed up as it runs; `rewire report` makes a page of its folder")
    count = experiment.num_edits or len(facts_of(experiment))
    folder = experiment.folder(count)
    steps = results.count(folder)
    if not steps:
        raise InputError(f"{folder}: no {results.results_file(folder, 1).name} there, nothing to sum up")
    made = _sum_up(experiment, folder, count, steps)
    batched = summary.batched(made)
    spreads = plots.spreads(made["all"], batched)
    facts = [made["facts"][-1], *made["facts"]]
    rows = []
    for number, cells in enumerate(summary.rows(made["all"], experiment.compat, batched)):
        found = dict(zip(summary.COLUMNS, cells, strict=True))
        metrics = {
            f"{kind.lower()}_{name}": value for (kind, name), value in found.items() if name in ("acc", "success")
        }
        metrics |= {"rewrite_ppl": found["Perplexity", "rewrite"], "me_ppl": found["Perplexity", "m-ppl-50"]}
        row = {"number": number, "facts": facts[number], "metrics": metrics}
        if number:
            row["initial"], row["optimization"] = found["Perplexity", "init"], found["Perplexity", "final"]
            row["spread"] = spreads[number]
        rows.append(row | _said(folder, number))
    return folder, rows


def _said(folder: Path, number: int) -> Row:
    """What a run of ours told of a step and its results do not: over how many texts, in how many iterations."""
    path = folder / PROGRESS
    steps = results.read_json(path).get("steps", {}) if path.is_file() else {}
    row = steps.get(str(number), {}).get("row", {})
    return {name: row[name] for name in ("texts", "iterations") if name in row}


class _Run:
    """One run, of which nothing outlives the process but what is on disk."""

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        facts: Sequence[Fact],
        texts: Sequence[str],
        progress: Progress,
        listener: Listener,
        tell: Callable[[Row], None],
    ) -> None:
        self.experiment, self.model, self.facts, self.texts = experiment, model, facts, texts
        self.progress, self.listener, self.tell = progress, listener, tell
        size = experiment.batch or len(facts)
        self.batches = [facts[start : start + size] for start in range(0, len(facts), size)]
        self.before: dict[str, Any] = {}
        self.hard: set[str] | None = None if len(self.batches) == 1 else set()

    def whole(self, session: EditSession) -> None:
        self.before = self._unedited()
        if "0" not in self.progress.steps:
            row = _row(0, self.before, None, 0.0, len(self.facts))
            self.progress.add(0, "", row | {"texts": len(self.texts)})
        self.tell(self.progress.rows[0])
        folder, asked = self.progress.folder, self.experiment
        edited: list[dict[str, float]] = []  # of each fact so far, what its own batch made of it
        for number, batch in enumerate(self.batches, 1):
            made: list[Iteration] = []

            def watch(iteration: Iteration, made: list[Iteration] = made) -> None:
                made.append(iteration)
                if len(self.batches) == 1:
                    self._step(iteration.number, iteration, [iteration])

            session.edit(batch, evaluate=False, iterations=asked.iterations, stop_gap=asked.stop_gap, watch=watch)
            if len(self.batches) > 1:
                edited += [
                    last | {"init_ppl": first["init_ppl"]}
                    for first, last in zip(made[0].facts, made[-1].facts, strict=True)
                ]
                self._step(number, _together(number, edited, made), made)
        _sum_up(asked, folder, len(self.facts), len(self.progress.rows) - 1)
        session.save(folder)
        self.progress.finish()

    def _step(self, number: int, iteration: Iteration, made: Sequence[Iteration]) -> None:
        """Measures the weights as they are, all facts edited so far, unless their results are there.

        made: the iterations that the step took
        """
        weights = weights_digest(self.model)
        facts = self.facts[: len(iteration.facts)]
        if self.progress.holds(number, weights):
            if number == 1 and self.hard is None:
                path = results.results_file(self.progress.folder, 1, hard=True)
                self.hard = {record["id"] for record in results.read_json(path)} if path.is_file() else set()
            self.tell(self.progress.steps[str(number)]["row"])
            return
        seconds = sum(one.seconds.get(phase, 0.0) for one in made for phase in EDIT)
        after = self._evaluate(facts, self.before)
        if self.hard is None:
            self.hard = results.hard_cases(after)
        before = self.before | {"facts": self.before["facts"][: len(facts)]}
        results.write(self.progress.folder, number, facts, before, after, iteration, seconds, self.hard)
        if len(self.batches) > 1:
            self._retention(number, after)
        row = _row(number, after, iteration, seconds, len(facts))
        if len(self.batches) > 1:
            row["iterations"] = len(made)
        self.progress.add(number, weights, row)
        self.tell(row)

    def _unedited(self) -> dict[str, Any]:
        """The evaluation of the model as it was given, from disk where any experiment made it."""
        config: Any = self.model.hf.config
        content = {
            "rewire": __version__,
            "weights": weights_digest(self.model),
            "config": config.to_json_string(),
            "dtype": str(next(self.model.hf.parameters()).dtype),
            "device": self.model.device.type,
            "versions": [torch.__version__, transformers.__version__],
            "facts": [to_record(fact) for fact in self.facts],
            "texts": list(self.texts),
            "tokens": encode(self.model, [fact.question for fact in self.facts]),
            "compat": self.experiment.compat,
        }
        path = cache_root() / "evaluations" / f"{content_digest(content)}.json"
        if not path.is_file():
            results.write_json(path, self._evaluate(self.facts, None))
        found: dict[str, Any] = results.read_json(path)
        return found

    def _evaluate(self, facts: Sequence[Fact], unedited: dict[str, Any] | None) -> dict[str, Any]:
        return evaluate(
            self.model,
            facts,
            "underedit",
            None,
            lambda done, total: self.listener(EVALUATE, done, total),
            unedited=unedited,
            texts=self.texts,
            compat=self.experiment.compat,
        )

    def _retention(self, number: int, after: dict[str, Any]) -> None:
        """Of each batch so far, what is left of it: a line a batch in `retention.json`."""
        path, start, lines = self.progress.folder / RETENTION, 0, []
        for place, batch in enumerate(self.batches[:number], 1):
            records = after["facts"][start : start + len(batch)]
            rates = {
                f"{kind}_{name}": mean([mean(record[kind][name]) for record in records])
                for kind in underedit.KINDS
                for name in ("acc", "success")
            }
            lines.append({"batch": place, "facts": len(batch)} | rates)
            start += len(batch)
        known = results.read_json(path) if path.is_file() and number > 1 else []
        results.write_json(path, [*known[: number - 1], {"after": number, "batches": lines}])


def _together(number: int, edited: list[dict[str, float]], made: Sequence[Iteration]) -> Iteration:
    """All facts edited so far as one iteration's; the perplexities are those of each fact's own batch."""
    initial, optimization, spread = (
        sum(fact[name] for fact in edited) / len(edited) for name in ("init_ppl", "opt_ppl", "spread_ppl")
    )
    return replace(made[-1], number=number, facts=edited[:], initial=initial, optimization=optimization, spread=spread)


def _row(number: int, measured: dict[str, Any], iteration: Iteration | None, seconds: float, facts: int) -> Row:
    row = {"number": number, "facts": facts, "metrics": measured["metrics"], "seconds": round(seconds, 4)}
    if iteration is not None:
        row |= {"initial": iteration.initial, "optimization": iteration.optimization, "spread": iteration.spread}
    return row


def _sum_up(experiment: Experiment, folder: Path, facts: int, steps: int) -> summary.Summary:
    made = summary.write(folder, steps, experiment.compat)
    summary.write_csv(folder, experiment.label(facts), made, experiment.compat)
    try:
        plots.draw(made, folder / "summary.png", experiment.title(facts))
    except InputError as error:  # a picture is not what a run fails for
        log.warning("no picture is drawn: %s", error)
    return made
