"""`rewire evaluate`: how well a model, with or without a delta, says what the facts ask for."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..kernels.errors import InputError
from . import common


def evaluate(
    model: common.ModelName,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Facts: .jsonl, .csv, or a published data set (.json).")],
    delta: Annotated[Path | None, typer.Option(help="The --out folder of an edit, applied before measuring.")] = None,
    protocol: Annotated[str, typer.Option(help="What is measured: counterfact or underedit.")] = "counterfact",
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts whose mean perplexity is measured, too (ME-PPL; underedit): .json, .jsonl or .txt."),
    ] = None,
    convention: common.Convention = None,
    limit: common.Limit = None,
    batch_tokens: common.BatchTokens = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    json: common.Json = False,
) -> None:
    """Measure success rates; with --protocol underedit and --delta also what stayed as it was without the delta.

    Example: rewire evaluate gpt2-xl facts.jsonl --delta edits/first
    """
    from ..engine.datasets import read_facts
    from ..engine.delta import Delta
    from ..engine.evaluation import evaluate, find_protocol
    from ..engine.evaluation.perplexity import read_texts

    find_protocol(protocol)  # what can be known to be wrong is said before the model is loaded
    if texts is not None and protocol != "underedit":
        raise InputError(f"--texts {texts}: --protocol {protocol} measures no perplexity of texts; underedit does")
    facts = read_facts(data, limit, convention)
    more: dict[str, Any] = {} if texts is None else {"texts": read_texts(texts)}
    change = None if delta is None else Delta.load(delta)
    loaded = common.load(model, dtype, device, quantize)
    states: dict[str, dict[str, Any]] = {}  # what is shown of each
    with common.bars() as listener:

        def measure(phase: str) -> dict[str, Any]:
            return evaluate(
                loaded, facts, protocol, batch_tokens, lambda done, total: listener(phase, done, total), **more
            )

        if change is not None and protocol == "underedit":
            more["unedited"] = measure("evaluate_unedited")
            states[model] = more["unedited"]["metrics"]
        if change is not None:
            change.apply(loaded)
        report = measure("evaluate")
    if json:
        common.print_json({"protocol": protocol, "metrics": report["metrics"], "facts": len(facts)})
        return
    states[f"{model}{' + ' + str(delta) if delta else ''}"] = report["metrics"]
    common.print_metrics(states, protocol)
    print(f"{common.count(len(facts), 'fact')}, protocol {protocol}")
