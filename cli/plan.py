"""`rewire plan`: memory and time of an edit, before anything is loaded."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import common

PLACES = ("device", "cpu", "disk")


def plan(
    model: common.ModelName,
    facts: Annotated[
        Path | None, typer.Argument(metavar="[FACTS]", help="Facts: .jsonl, .csv, or a published data set (.json).")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--facts", min=1, help="How many (the first of the file's); default: all, or 100.")
    ] = None,
    convention: common.Convention = None,
    method: common.MethodName = "memit",
    preset: common.Preset = None,
    settings: common.Settings = None,
    iterations: Annotated[int, typer.Option(min=1, help="Passes of the edit; statistics are collected once.")] = 1,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of the statistics; default: the preset's.")] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    json: common.Json = False,
) -> None:
    """Say what an edit will take, by phase: memory, disk, and the least time at the rates of this machine.

    Nothing but the model's config is read. Rates are measured for about half a second.

    Example: rewire plan gpt2-xl facts.jsonl --method alphaedit
    """
    from ..bench.ceilings import quick
    from ..engine.datasets import read_facts
    from ..engine.editors.registry import find_method
    from ..engine.hparams import load_hparams, parse_overrides
    from ..engine.outline import outline
    from ..engine.plan import Texts, plan, rated_dtypes

    kind = find_method(method).hparams
    texts = Texts(count or 100) if facts is None else Texts.of(read_facts(facts, count, convention))
    found = outline(model, dtype, quantize, device)
    hparams, source = load_hparams(kind, method, found.name, found.anatomy, preset, parse_overrides(settings or []))
    rates = quick(found.device, rated_dtypes(found))
    floor = partial(rates.floor, device=found.device)
    made = plan(found, hparams, method, texts, floor, tokens, iterations)
    report = made.report() | {
        "model": found.name,
        "device": str(found.device),
        "method": method,
        "preset": source,
        "layers": list(hparams.layers),
        "facts": texts.facts,
        "rates": {row["name"] + " " + row["dtype"]: row["rate"] for row in rates.rows},
    }
    if json:
        common.print_json(report)
        return
    _show(report)


def _show(report: dict[str, Any]) -> None:
    print(f"{report['model']} on {report['device']}: {report['method']}, layers {report['layers']}, {report['preset']}")
    places = [place for place in PLACES if place != "device" or report["need"]["device"]]
    table = Table("phase", *places, "seconds", "")
    for phase in report["phases"]:
        sizes = (_size(phase[f"{place}_bytes"]) for place in places)
        seconds = "-" if phase["seconds"] is None else f"{phase['seconds']:.3g}"
        table.add_row(phase["name"], *sizes, seconds, escape(phase["what"]))
    for label, row in (("needed at once", report["need"]), ("free now", report["free"])):
        table.add_row(label, *(_size(row[place]) for place in places), "", "")
    common.console().print(table)
    sums = report["accumulators"]
    print(f"running sums of the statistics: float32 on the {sums['float32']}, float64 on the {sums['float64']}")
    print(f"seconds are floors at rates measured just now, in about half a second: {_rates(report['rates'])}")
    passes = "one pass" if report["iterations"] == 1 else f"{report['iterations']} passes"
    print(f"all of it for {passes} without neighbours; evaluation is not in it")
    print("it fits" if report["fits"] else "it does not fit; what helps:")
    for line in report["advice"]:
        print(f"  {line}")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count else "-"


def _rates(rates: dict[str, float | None]) -> str:
    known = {name: rate for name, rate in rates.items() if rate is not None}
    return ", ".join(f"{name.removesuffix(' uint8')} {rate / 1e9:,.0f} G/s" for name, rate in known.items())
