"""`rewire run`: a whole experiment: edit, measure, again, and sum up."""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common

if TYPE_CHECKING:
    from ..engine.experiment.config import Experiment

# the table's columns, within a terminal's eighty
RATES = {"efficacy": "efficacy", "paraphr.": "generalization", "specif.": "specificity", "score": "score"}
PERPLEXITIES = {"OPT": "optimization", "SPREAD": "spread", "ME-PPL": "me_ppl"}
HEADER = "step facts" + "".join(f" {name:>8}" for name in (*RATES, *PERPLEXITIES)) + " secs."
LEGEND = """acc/success in %, rounded; step 0 is the unedited model; perplexities of the new objects with their values
put in by hand (OPT) and of the edited weights (SPREAD), and of {texts} (ME-PPL)"""


def run(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Experiment in YAML; flags win over its keys.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "--model-name", "--model_name", help="Model directory, hub id, or a published name (gpt-j-6B)."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "--alg-name", "--alg_name", help="Editing method, or its published name (MEMIT_RECURSIVE)."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "--ds-name", "--ds_name", help="mcf, zsre, zsre-alt, or a file of facts.")
    ] = None,
    convention: common.Convention = None,
    subset: Annotated[
        int | None, typer.Option("--subset", "--ds-subset", "--ds_subset", min=0, help="Of a data set by name.")
    ] = None,
    num_edits: Annotated[
        int | None, typer.Option("--num-edits", "--num_edits", min=1, help="The first N facts only.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data sets by name, and of ME-PPL_50.json; default: data.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Edit so many times over; default: 1.")] = None,
    neighbors: Annotated[
        bool | None, typer.Option("--neighbors/--no-neighbors", help="Edit-time neighbours enter the values.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Facts edited together, batch after batch; default: all at once.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="single|sequential|batch",
            help="Each fact alone on the clean model; one after the other; or batch after batch; with --protocol.",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="What a mode measures: wild, synthetic, counterfact, zsre or ripple."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Around each question: question-only, qa_inst, chat or chat_temp.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Who judges answers (wild): auto, exact or llm.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model of the llm judge.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Its OpenAI-compatible endpoint.")] = None,
    only_wrong: Annotated[
        bool | None, typer.Option("--only-wrong", help="Only facts that the unedited model gets wrong (wild).")
    ] = None,
    checkpoints: Annotated[
        int | None, typer.Option(min=1, help="In a mode, measure all facts so far every N edits; default: at the end.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "--hparams-fname",
            "--hparams_fname",
            help="Preset file or name; default: found by the model's name.",
        ),
    ] = None,
    settings: common.Settings = None,
    stats: Annotated[
        str | None, typer.Option(help="Folder of second moments; pull: those published; default: cached or collected.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text, JSONL, or `datasets` id to collect second moments over.")
    ] = None,
    contexts: common.Contexts = None,
    perplexity: Annotated[
        Path | None, typer.Option(help="Texts whose perplexity is followed; default: the data folder's ME-PPL_50.json.")
    ] = None,
    stop_gap: Annotated[
        float | None, typer.Option(min=0, help="Stop once |SPREAD - OPTIMIZATION| perplexity is at most this.")
    ] = None,
    compat: Annotated[
        bool | None, typer.Option("--compat/--no-compat", help="Published behaviour where the default differs.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampled context templates.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:N, or balanced (GPUs, then CPU, then disk).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, float16, or checkpoint (as stored).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Root of the results' folders; default: results.")] = None,
    summarize: Annotated[bool, typer.Option("--summarize", help="Edit nothing: sum up what is there again.")] = False,
    json: common.Json = False,
) -> None:
    """Run an experiment: edit, measure, again, and sum up. Interrupted, the same command goes on.

    Example: rewire run --model gpt2-xl --data mcf --subset 1 --iterations 5
    """
    flags: dict[str, Any] = {
        key: value for key, value in locals().items() if key not in ("file", "settings", "summarize", "json")
    }
    from ..engine.experiment.config import read_experiment
    from ..engine.experiment.run import run as run_experiment
    from ..engine.experiment.run import summarize as sum_up
    from ..engine.hparams import parse_overrides
    from ..kernels.errors import InputError

    start = time.perf_counter()
    experiment = read_experiment(file, flags | {"set": parse_overrides(settings or []) or None})
    if summarize:
        folder, rows = sum_up(experiment)
        for row in [] if json else rows:
            _print_row(row)
        _end(experiment, folder, rows, time.perf_counter() - start, json)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("rewire run is one process; torchrun started several: use rewire edit for them")
    rows = []

    def tell(row: dict[str, Any]) -> None:
        if not json:
            if experiment.mode is None:
                _print_row(row)
            else:
                _print_checkpoint(row, experiment.protocol)
        rows.append(row)

    try:
        with common.bars() as listener:
            folder = run_experiment(experiment, listener, tell, common.load)
    except KeyboardInterrupt:
        steps = f"{common.count(len(rows) - 1, 'step')} measured"
        there = ("nothing measured yet", "the unedited model measured", steps)
        print(
            f"rewire: interrupted, {there[min(len(rows), 2)]}; given again, the same command goes on", file=sys.stderr
        )
        raise typer.Exit(3) from None
    _end(experiment, folder, rows, time.perf_counter() - start, json)


def _print_row(row: dict[str, Any]) -> None:
    """One step of the table, with its header where it is the first."""
    if row["number"] == 0:
        print(HEADER)
    metrics = row["metrics"]
    rates = [f"{_percent(metrics[f'{kind}_acc'])}/{_percent(metrics[f'{kind}_success'])}" for kind in RATES.values()]
    numbers = [_number(row.get(name, metrics.get(name))) for name in PERPLEXITIES.values()]
    seconds = f"{row['seconds']:.{1 if row['seconds'] < 1000 else 0}f}" if row["number"] and "seconds" in row else ""
    line = f"{row['number']:>4} {row['facts']:>5}" + "".join(f" {text:>8}" for text in (*rates, *numbers))
    print(f"{line} {seconds:>5}".rstrip(), flush=True)


def _print_checkpoint(row: dict[str, Any], protocol: str) -> None:
    """One line of a mode: how many facts, and each metric."""
    of = "unedited" if row["number"] == 0 else "edited"
    found = row["metrics"]
    metrics = ", ".join(
        f"{label} {common.said(name, found[name])}" for name, label in common.labels(protocol, found)
        if found[name] is not None
    )  # fmt: skip
    print(f"{common.count(row['facts'], 'fact')} {of}: {metrics}", flush=True)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _stopped(experiment: "Experiment", rows: list[dict[str, Any]]) -> str | None:
    """How `stop_gap` ended it, where it did before the last iteration; of batches, how many ended so."""
    asked, gap = experiment.iterations, experiment.stop_gap
    if gap is None:
        return None
    last = rows[-1]
    spread: Any = last.get("spread")
    optimization: Any = last.get("optimization")
    if "iterations" in last:
        took = [row.get("iterations", asked) for row in rows[1:]]
        short = Counter(number for number in took if number < asked)
        ends = [
            f"after {number} of {asked} in {times} of {len(took)} batches" for number, times in sorted(short.items())
        ]
    else:
        known = spread is not None and optimization is not None
        ended = last["number"] < asked and known and abs(spread - optimization) <= gap
        ends = [f"after {last['number']} of {asked}"] if ended else []
    return f"stopped {', '.join(ends)}: SPREAD within {gap:g} of OPTIMIZATION" if ends else None


def _end(experiment: "Experiment", folder: Path, rows: list[dict[str, Any]], seconds: float, json: bool) -> None:
    if json:
        common.print_json({"out": str(folder), "iterations": rows, "seconds": round(seconds, 4)})
        return
    if experiment.mode is not None:
        took = rows[-1]["seconds"]
        print(f"edited in {took['edit']:.1f} s, measured in {took['evaluate']:.1f} s")
        print(f"written to {folder}; rewire report {folder} makes a page of it")
        return
    texts = rows[0].get("texts")
    print(LEGEND.format(texts=common.count(texts, "text") if texts else "the texts"))
    if stopped := _stopped(experiment, rows):
        print(stopped)
    print(f"written to {folder}")
