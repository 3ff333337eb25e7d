"""`rewire evaluate`: success rates of a model, edited or not, under any protocol."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..kernels.errors import InputError
from . import common

PROTOCOLS = "counterfact, underedit, zsre, synthetic, wild, ripple, perplexity, drift or ability"
WITHOUT_FACTS = ("perplexity", "ability")  # drift: facts or texts


def evaluate(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model directory or hub id, or demo.")] = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA", help="Facts: .jsonl, .csv, or a published data set (.json); none for perplexity, ability."
        ),
    ] = None,
    delta: Annotated[Path | None, typer.Option(help="The --out folder of an edit, applied before measuring.")] = None,
    protocol: Annotated[str, typer.Option(help=f"What is measured: {PROTOCOLS}.")] = "counterfact",
    context: Annotated[
        str | None,
        typer.Option(help="Around each question (wild: qa_inst; synthetic: question-only; chat, chat_temp)."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Who judges answers (wild): exact, llm (needs a key), or auto, llm where there is one."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model of the llm judge.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="Its OpenAI-compatible endpoint.")] = None,
    truncation: Annotated[
        str | None, typer.Option(help="Answers (wild): natural, or gold: the object's length.")
    ] = None,
    locality: Annotated[
        int | None, typer.Option(min=0, help="Questions about other things, a fact (wild, synthetic); default: 1.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts (underedit, perplexity, drift): .json, .jsonl or .txt."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task of lm-evaluation-harness, or its file (ability).")
    ] = None,
    generation: Annotated[
        bool, typer.Option("--generation", help="Also what is written about the subjects (counterfact).")
    ] = False,
    snippets: Annotated[
        Path | None, typer.Option(help="CounterFact's attribute_snippets.json, to compare that with.")
    ] = None,
    compat: common.Compat = False,
    convention: common.Convention = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first N records (perplexity: texts, ability: documents) only.")
    ] = None,
    batch_tokens: common.BatchTokens = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows at once; default: by free memory.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the results of every fact.")] = None,
    validate: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Measure nothing: list what is wrong with a file of facts.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    json: common.Json = False,
) -> None:
    """Measure a model under a protocol; with --delta the edited one, compared with the unedited where it can be.

    Answers are kept as they come: interrupted, the same command goes on.

    Example: rewire evaluate gpt2-xl facts.jsonl --delta edits/first
    """
    if validate is not None:
        from .validate import show

        raise typer.Exit(show(validate, convention, json))
    from ..engine.answer_store import AnswerStore
    from ..engine.datasets import read_facts
    from ..engine.delta import Delta
    from ..engine.evaluation import evaluate, find_protocol
    from ..engine.evaluation.contexts import check_context
    from ..engine.evaluation.outcome import write
    from ..engine.evaluation.perplexity import read_texts
    from ..engine.evaluation.wild import GOLD, NATURAL
    from ..engine.report import versions

    found = find_protocol(protocol)  # what can be known to be wrong is said before anything is loaded
    if model is None:
        raise InputError("a MODEL is missing; expected `rewire evaluate MODEL DATA`, or --validate DATA alone")
    if data is None and protocol not in (*WITHOUT_FACTS, "drift"):
        raise InputError(f"DATA is missing; --protocol {protocol} measures facts: name a file of them")
    if data is not None and protocol in WITHOUT_FACTS:
        raise InputError(f"DATA {data}: --protocol {protocol} measures no facts; leave it out")
    if out is not None:
        common.new_folder(out)
    given = {
        **{"context": context, "truncation": truncation, "locality": locality, "tasks": task or None},
        **{"compat": compat or None, "texts": texts, "judge": judge},
    }
    more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in more:
        if name not in found.options:
            raise InputError(f"{_flag(name)}: --protocol {protocol} takes none; it is of {_takers(name)}")
    if protocol != "wild" and (judge_model or judge_url):
        named = "--judge-model" if judge_model else "--judge-url"
        raise InputError(f"{named}: --protocol {protocol} takes none; it is of wild")
    if protocol != "counterfact" and (generation or snippets):
        named = "--generation" if generation else "--snippets"
        raise InputError(f"{named}: --protocol {protocol} takes none; it is of counterfact")
    if context is not None:
        check_context(context)
    if truncation not in (None, NATURAL, GOLD):
        raise InputError(f"--truncation {truncation}: expected {NATURAL} or {GOLD}")
    if "weights" in found.options and delta is None:
        raise InputError(f"--protocol {protocol} compares with the unedited model; name an edit with --delta")
    if texts is not None:
        more["texts"] = read_texts(texts)[: limit if data is None else None]
    elif protocol == "perplexity" or (protocol == "drift" and data is None):
        also = ", or DATA with questions about other things" if protocol == "drift" else ""
        raise InputError(f"--texts is missing; --protocol {protocol} reads texts (.json, .jsonl or .txt){also}")
    if protocol == "ability" and limit is not None:
        more["limit"] = limit
    if protocol == "wild":
        more["judge"] = common.find_judge(judge or "auto", judge_model, judge_url)
    facts = [] if data is None else read_facts(data, limit, convention, generation=generation, snippets=snippets)
    change = None if delta is None else Delta.load(delta)
    loaded = common.load(model, dtype, device, quantize)
    if change is not None:
        change.check(loaded)
    fingerprint = loaded.fingerprint
    states: dict[str, dict[str, Any]] = {}  # what is shown of each
    seconds: dict[str, float] = {}
    with common.bars() as listener:

        def measure(phase: str, unedited: bool) -> dict[str, Any]:
            start = time.perf_counter()
            with AnswerStore.of(loaded, keep=unedited) as store:
                report = evaluate(
                    loaded, facts, protocol, batch_tokens, lambda done, total: listener(phase, done, total),
                    batch_size=batch_size, store=store, **more,
                )  # fmt: skip
            seconds[phase] = round(time.perf_counter() - start, 4)
            return report

        before = None
        if change is not None and found.against:
            before = more["unedited"] = measure("evaluate_unedited", True)
            states[model] = before["metrics"]
        if change is not None:
            weights = change.apply(loaded)
            if "weights" in found.options:
                more["weights"] = weights
        report = measure("evaluate", change is None)
    about = {
        "model": model,
        "fingerprint": fingerprint,
        "delta": None if delta is None else str(delta),
        "data": None if data is None else str(data),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "seconds": seconds,
        "versions": versions(),
    }
    if out is not None:
        write(out, facts, report, before, about)
    if json:
        common.print_json(
            {"protocol": protocol, "metrics": report["metrics"], "facts": len(facts), "seconds": seconds}
            | ({} if before is None else {"unedited": before["metrics"]})
            | {key: report[key] for key in ("judge", "context") if key in report}
            | ({} if out is None else {"out": str(out)})
        )
        return
    states[f"{model}{' + ' + str(delta) if delta else ''}"] = report["metrics"]
    common.print_metrics(states, protocol)
    judged = f", judged by {report['judge']['kind']}" if "judge" in report else ""
    what = [common.count(len(facts), "fact")] if facts else []
    what += [common.count(len(more["texts"]), "text")] if "texts" in more else []
    print(f"{', '.join([*what, f'protocol {protocol}'])}{judged}")
    if out is not None:
        print(f"written to {out}; rewire report {os.fspath(out)} makes a page of it")


def _flag(name: str) -> str:
    return "--task" if name == "tasks" else f"--{name}"


def _takers(name: str) -> str:
    from ..engine.evaluation import find_protocol, protocol_names

    return ", ".join(known for known in protocol_names() if name in find_protocol(known).options)
