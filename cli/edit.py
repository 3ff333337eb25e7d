"""`rewire edit`: facts in, weights out, proof that it worked."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def edit(
    model: common.ModelName,
    facts: Annotated[
        Path, typer.Argument(metavar="FACTS", help="Facts: .jsonl, .csv, or a published data set (.json).")
    ],
    out: Annotated[Path, typer.Option(help="New folder for delta.safetensors, report.json and ledger.jsonl.")],
    method: common.MethodName = "memit",
    iterations: Annotated[
        int, typer.Option(min=1, help="Passes, each from the weights that the last one left (UnderEdit).")
    ] = 1,
    stop_gap: Annotated[
        float | None, typer.Option(min=0, help="End the passes once SPREAD is this near OPTIMIZATION (perplexity).")
    ] = None,
    neighbors: Annotated[
        bool, typer.Option("--neighbors", help="Hold the facts' edit_neighbors as they are (OverEdit).")
    ] = False,
    compat: common.Compat = False,
    preset: common.Preset = None,
    settings: common.Settings = None,
    stats: common.Stats = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text, JSONL, or `datasets` id to collect second moments over.")
    ] = None,
    projections: Annotated[
        Path | None, typer.Option(help="AlphaEdit: published null_space_project.pt instead of second moments.")
    ] = None,
    contexts: common.Contexts = None,
    batch_size: common.BatchSize = "auto",
    limit: common.Limit = None,
    convention: common.Convention = None,
    skip_invalid: common.SkipInvalid = False,
    evaluate: Annotated[bool, typer.Option(help="Measure success before and after.")] = True,
    seed: common.Seed = 0,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    impl: common.Impl = "auto",
    json: common.Json = False,
) -> None:
    """Edit the facts into the model; what changed is written beside it, the model itself stays as it is.

    Interrupted, the same command goes on. Several GPUs share statistics and values:
    torchrun --no-python --nproc-per-node 8 rewire edit ...

    Example: rewire edit gpt2-xl facts.jsonl --method memit --out edits/first
    """
    from ..engine.datasets import read_facts, scan_facts
    from ..engine.editors.names import known_method
    from ..kernels.errors import InputError

    # what can be known to be wrong is said before the model is loaded, and most of it before torch is
    known_method(method)
    common.new_folder(out)
    at_once = common.batch_size(batch_size)
    if stats is not None and not stats.is_dir():
        raise InputError(f"--stats {stats}: no such folder; expected one that holds second moments")
    wanted, skipped = (
        scan_facts(facts, limit, convention) if skip_invalid else (read_facts(facts, limit, convention), [])
    )
    if not wanted:
        raise InputError(f"{facts}: none of its facts can be edited; {skipped[0].where}: {skipped[0].reason}")

    from ..engine.editors.registry import find_method
    from ..engine.hparams import check_names, parse_overrides
    from ..engine.prompts import read_contexts
    from ..engine.session import EditSession
    from ..stats import read_corpus
    from ..stats.ranks import join

    overrides = parse_overrides(settings or [])
    check_names(find_method(method).hparams, overrides)
    text = None if corpus is None else read_corpus(corpus)
    templates = None if contexts is None else read_contexts(contexts)
    ranks = join()
    common.only_first(ranks)
    loaded = common.load(model, dtype, device)
    with common.bars(shown=ranks.first) as listener:
        session = EditSession(
            loaded,
            method,
            preset,
            stats,
            hparams=overrides,
            corpus=text,
            projections=projections,
            contexts=templates,
            seed=seed,
            batch_size=at_once,
            impl=impl,
            listener=listener,
            neighbors=neighbors,
            compat=compat,
            ranks=ranks,
        )
        done = session.edit(wanted, evaluate, skipped, iterations=iterations, stop_gap=stop_gap)
        if not ranks.first:
            return
        session.save(out)
    report = done.report
    if json:
        common.print_json(
            {
                "facts": len(wanted),
                "out": str(out),
                "seconds": report["seconds"],
                "values": report["values"],
                "iterations": report["iterations"],
                "before": report["before"],
                "after": report["after"],
                "skipped": report["skipped"],
                "implementations": report["implementations"],
            }
        )
        return
    for record in skipped:
        print(f"skipped {record.where}: {record.reason}")
    print(f"{common.count(len(wanted), 'fact')} edited into {model} with {report['method']}, {report['preset']}")
    if evaluate:
        common.print_metrics({"before": report["before"], "after": report["after"]})
        lost = [f["subject"] for f in report["facts"] if f["after"]["efficacy"]["accuracy"] < 1]
        named = f"; not for {', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''} (all in report.json)" if lost else ""
        print(f"the new object is the most probable one for {len(wanted) - len(lost)} of {len(wanted)}{named}")
    for source, tokens in dict.fromkeys(
        (str(Path(row["source"]).parent) if Path(row["source"]).is_file() else row["source"], row.get("tokens"))
        for row in report["statistics"].values()
    ):
        print(f"statistics: {source}" + (f", {tokens:,} tokens" if tokens else ""))
    if report["values"]:
        print(values_line(report["values"]))
    if iterations > 1:
        for row in report["iterations"]:
            print(
                f"iteration {row['number']}: perplexity {row['initial']:.3g}, {row['optimization']:.3g} optimised, "
                f"{row['spread']:.3g} with the weights written"
            )
        if len(report["iterations"]) < iterations:
            print(f"ended after {len(report['iterations'])} of {iterations}: the two are within {stop_gap:g}")
    print(common.seconds_line(report["seconds"]))
    print(f"written to {out}; the model with the edit in it is made by")
    words = ["rewire", "merge", str(out), "--to", model]
    if report["dtype"] == "float16":
        words += ["--dtype", "float16"]  # its weights are not those of another dtype
    print(f"  {shlex.join([*words, '--out'])} NEW")


def values_line(values: Mapping[str, Any]) -> str:
    """How the values went, in one line."""
    cached = f", {values['cached']:,} from the cache" if values["cached"] else ""
    if not values["optimised"]:
        return f"values: all {values['facts']:,} from the cache"
    return (
        f"values: {values['optimised']:,} optimised{cached}; {values['facts_per_second']:,.1f} facts/s, "
        f"{values['mean_steps']:.1f} steps on average, {values['capacity']} at once"
    )
