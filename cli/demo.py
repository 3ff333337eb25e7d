"""`rewire demo`: the main job on the embedded model."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import common


def demo(
    limit: Annotated[int, typer.Option(min=1, help="Facts to edit.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Also write the delta and report into this new folder.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Facts shown in the table.")] = 10,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:
    """Edit facts of the embedded model and show what it says before and after.

    Example: rewire demo --limit 200
    """
    from ..engine.datasets import read_facts
    from ..engine.decoding import continuations
    from ..engine.model import demo_file
    from ..engine.session import SAID_TOKENS, EditSession

    start = time.perf_counter()
    if out is not None:
        common.new_folder(out)
    facts = read_facts(demo_file("facts.jsonl"), limit)
    model = common.load("demo", dtype, device)
    shown = [fact for fact in facts if fact.paraphrases and fact.neighbors][:show]
    questions = [q for fact in shown for q in (fact.question, fact.paraphrases[0], fact.neighbors[0])]
    with common.bars() as listener:
        session = EditSession(model, "memit", seed=seed, listener=listener)
        before = continuations(model, questions, SAID_TOKENS)
        done = session.edit(facts)
        after = continuations(model, questions, SAID_TOKENS)
        if out is not None:
            session.save(out)
    report = done.report
    if json:
        common.print_json(
            {"facts": len(facts), "out": str(out) if out else None}
            | {key: report[key] for key in ("seconds", "before", "after")}
        )
        return
    console = Console()
    table = Table("prompt", "asked for", "before", "after", title="what the model says", title_justify="left")
    for i, fact in enumerate(shown):
        for j, kind in enumerate(("", "paraphrase", "neighbour")):
            at = 3 * i + j
            table.add_row(
                escape(questions[at]),
                escape(fact.target_new) if j == 0 else f"[dim]{kind}[/dim]",
                escape(_first_words(before[at])),
                escape(_first_words(after[at])),
                end_section=j == 2,
            )
    console.print(table)
    common.print_metrics({"before": report["before"], "after": report["after"]})
    seconds = time.perf_counter() - start
    print(f"{common.count(len(facts), 'fact')} with MEMIT in {seconds:.1f} s: {common.seconds_line(report['seconds'])}")
    print("your own model:  rewire edit MODEL facts.jsonl --out DIR")


def _first_words(text: str) -> str:
    """Up to the end of the sentence."""
    return text.strip().split(".")[0].split("\n")[0]
