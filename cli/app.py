"""The verbs of `rewire`, put together."""

from typing import Annotated

import typer

from .. import __version__
from . import bench, demo, edit, evaluate, inspect, merge, neighbors, plan, presets, report, run, stats

app = typer.Typer(
    name="rewire",
    help="Edit facts in large language models, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


app.command("demo")(demo.demo)
app.command("edit")(edit.edit)
app.command("evaluate")(evaluate.evaluate)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)
app.command("neighbors")(neighbors.neighbors)
app.command("plan")(plan.plan)
app.command("presets")(presets.presets)
app.command("report")(report.report)
app.command("run")(run.run)
app.add_typer(stats.stats, name="stats")
app.add_typer(bench.bench, name="bench")
