"""`rewire bench`: throughput, each figure with its correctness check in the same run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import common

bench = typer.Typer(help="Profile throughput, each figure with its correctness check.", no_args_is_help=True)


@bench.callback()
def group() -> None:
    """Profile throughput, each figure with its correctness check in the same run."""


@bench.command("values")
def values(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Model directory or hub id.")] = "demo",
    facts: Annotated[Path | None, typer.Argument(metavar="[FACTS]", help="Facts; default: the demo's.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Facts to optimise.")] = 64,
    preset: common.Preset = None,
    settings: common.Settings = None,
    contexts: common.Contexts = None,
    batch_size: common.BatchSize = None,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:
    """Batched value optimisation against the serial one, checked fact by fact.

    Example: rewire bench values gpt2-xl facts.jsonl --limit 64
    """
    from ..bench.values import bench_values
    from ..engine.datasets import read_facts
    from ..engine.editors.registry import find_method
    from ..engine.hparams import load_hparams, parse_overrides
    from ..engine.model import demo_file
    from ..engine.passes import sample_contexts
    from ..engine.prompts import read_contexts

    wanted = read_facts(facts or demo_file("facts.jsonl"), limit)
    loaded = common.load(model, dtype, device)
    kind = find_method("memit").hparams
    hparams, _ = load_hparams(kind, "memit", loaded.name, loaded.anatomy, preset, parse_overrides(settings or []))
    templates = sample_contexts(loaded, seed) if contexts is None else read_contexts(contexts)
    with common.bars() as listener:
        result = bench_values(
            loaded, wanted, templates, hparams, batch_size, lambda done, total: listener("serial", done, total)
        )
    if json:
        common.print_json(result)
    else:
        _table(result)
    if result["check"] != "passed":
        raise typer.Exit(1)


def _table(result: dict[str, object]) -> None:
    console = Console()
    console.print(f"check {result['check']}: worst relative difference of a value {result['worst']:.1e}")
    if result["near_ties"]:
        console.print(f"not compared, their loss is a near-tie with the stop: {result['near_ties']}")
    rows = result["rows"]
    assert isinstance(rows, list)
    table = Table("name", "dtype", "shape", "seconds", "serial", "ratio", "peak MiB")
    for row in rows:
        table.add_row(
            row["name"], row["dtype"], str(row["shape"]), f"{row['seconds']:.2f}", f"{row['baseline_seconds']:.2f}",
            f"{row['ratio']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    console.print(table)
