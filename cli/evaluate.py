"""`rewire evaluate`: how well a model, with or without a delta, says what the facts ask for."""

from pathlib import Path
from typing import Annotated

import typer

from . import common


def evaluate(
    model: common.ModelName,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Facts: .jsonl, .csv, or a published data set (.json).")],
    delta: Annotated[Path | None, typer.Option(help="The --out folder of an edit, applied before measuring.")] = None,
    protocol: Annotated[str, typer.Option(help="What is measured.")] = "counterfact",
    limit: common.Limit = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Padded tokens of a forward; default: by free memory.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    json: common.Json = False,
) -> None:
    """Measure success rates.

    Example: rewire evaluate gpt2-xl facts.jsonl --delta edits/first
    """
    from ..engine.datasets import read_facts
    from ..engine.delta import Delta
    from ..engine.evaluation import evaluate, find_protocol

    find_protocol(protocol)  # what can be known to be wrong is said before the model is loaded
    facts = read_facts(data, limit)
    change = None if delta is None else Delta.load(delta)
    loaded = common.load(model, dtype, device, quantize)
    if change is not None:
        change.apply(loaded)
    with common.bars() as listener:
        report = evaluate(loaded, facts, protocol, batch_tokens, lambda done, total: listener("evaluate", done, total))
    if json:
        common.print_json({"protocol": protocol, "metrics": report["metrics"], "facts": len(facts)})
        return
    common.print_metrics({f"{model}{' + ' + str(delta) if delta else ''}": report["metrics"]})
    print(f"{common.count(len(facts), 'fact')}, protocol {protocol}")
