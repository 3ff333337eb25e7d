"""`rewire bench`: throughput, each figure with its correctness check in the same run."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import common

bench = typer.Typer(help="Profile throughput, each figure with its correctness check.", no_args_is_help=True)


@bench.callback()
def group() -> None:
    """Profile throughput, each figure with its correctness check in the same run."""


@bench.command("throughput")
def throughput(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model directory or hub id; default: --config.")
    ] = None,
    method: Annotated[str, typer.Option(help="memit: the serial baseline is MEMIT's.")] = "memit",
    facts: Annotated[int, typer.Option("--facts", min=1, help="How many.")] = 64,
    config: Annotated[
        str | None, typer.Option(help="Random weights in a published shape: gpt2 (default), gpt2-xl, gpt-j-6b, ...")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Facts; default: made from the demo's.")] = None,
    serial: Annotated[int, typer.Option(min=1, help="Of them, through the serial baseline.")] = 8,
    steps: Annotated[int | None, typer.Option(min=2, help="Most steps of a value; default: the preset's.")] = None,
    batch_size: common.BatchSize = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of both sides.")] = "float32",
    device: common.Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for throughput.json and throughput.png.")] = None,
    json: common.Json = False,
) -> None:
    """A whole edit by phases, against its floors and, on a sample of the facts, the serial baseline, checked first.

    Example: rewire bench throughput gpt2-xl --facts 64 --out profile
    """
    from ..bench.about import find_dtype
    from ..bench.compare import BOUNDS
    from ..bench.shapes import CONTEXTS, made_facts, shaped_hparams, shaped_model
    from ..bench.throughput import bench_throughput, save
    from ..engine.datasets import read_facts
    from ..engine.editors.registry import find_method
    from ..engine.hparams import Hparams, load_hparams
    from ..engine.model import pick_device
    from ..kernels.errors import InputError

    if find_method(method).name != "memit":
        raise InputError(f"--method {method}: expected memit: the serial baseline is MEMIT's")
    if model is not None and config is not None:
        raise InputError(f"MODEL {model} and --config {config}: expected one of them")
    kind = find_dtype(dtype)
    if kind not in BOUNDS:
        raise InputError(f"--dtype {dtype}: expected float32 or bfloat16")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file; expected a folder, or a new name")
    at_once = common.batch_size(batch_size)
    asked = made_facts(facts) if data is None else read_facts(data, facts)
    settings = {} if steps is None else {"v_num_grad_steps": steps}
    if model is None:
        loaded = shaped_model(config or "gpt2", pick_device(device), kind)
        hparams = shaped_hparams(config or "gpt2", loaded, settings)
    else:
        loaded = common.load(model, dtype, device)
        hparams, _ = load_hparams(Hparams, "memit", loaded.name, loaded.anatomy, None, settings)
    with common.bars() as listener:
        report = bench_throughput(loaded, asked, CONTEXTS, hparams, serial, at_once, listener=listener)
    if out is not None:
        save(report, out)
    if json:
        common.print_json(report)
    else:
        _throughput_table(report)
    if report["check"] != "passed":
        raise typer.Exit(1)


@bench.command("stats")
def stats(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Default: GPT-2 small's shape, random weights.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Text to collect over; default: the demo's.")] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 3,4,5; default: those of MEMIT's preset.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of whole documents, about.")] = 8192,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Of the forward: float32 or bfloat16; default: both.")
    ] = None,
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Second moments of several layers in one pass against the published structure, checked element by element.

    Example: rewire bench stats gpt2-xl --corpus wikipedia.jsonl
    """
    from ..bench.about import find_dtype
    from ..bench.stats import BOUNDS, RANDOM_LAYERS, bench_stats, random_gpt2, take_rows
    from ..engine.model import demo_file, pick_device
    from ..engine.statistics import parse_layers, wanted
    from ..kernels.errors import InputError
    from ..stats import read_corpus

    text = read_corpus(corpus or demo_file("corpus.txt"))
    kinds = [find_dtype(name) for name in dtype or ()] or list(BOUNDS)
    if not set(kinds) <= set(BOUNDS):
        raise InputError(f"--dtype {' '.join(dtype or ())}: expected float32 or bfloat16")
    numbers = parse_layers(layers)
    loaded = random_gpt2(pick_device(device)) if model is None else common.load(model, "float32", device)
    usual = [loaded.anatomy.layer_name(layer) for layer in RANDOM_LAYERS] if model is None else None
    names = usual if usual and numbers is None else wanted(loaded, numbers).modules
    with common.bars() as listener:
        rows = take_rows(text, loaded, tokens)
        result = bench_stats(loaded, rows, names, kinds, progress=lambda done, total: listener("runs", done, total))
    if json:
        common.print_json(result)
    else:
        _statistics_table(result)
    if result["check"] != "passed":
        raise typer.Exit(1)


@bench.command("evaluation")
def evaluation(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id, or demo.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Facts: .jsonl, .csv, or a published data set (.json).")],
    singles: Annotated[
        bool, typer.Option("--singles", help="Single edits at once against one after the other; else answers (wild).")
    ] = False,
    method: common.MethodName = "rome",
    facts: Annotated[int | None, typer.Option("--facts", min=1, help="How many; default: all.")] = None,
    serial: Annotated[int, typer.Option(min=1, help="Of them, the published way (without --singles).")] = 40,
    context: Annotated[
        str | None, typer.Option(help="Around each question; default: qa_inst, with --singles question-only.")
    ] = None,
    preset: common.Preset = None,
    stats: common.Stats = None,
    contexts: common.Contexts = None,
    convention: common.Convention = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:
    """Generated answers against the published way, or single edits all at once against one by one; outcomes compared.

    Example: rewire bench evaluation gpt2-xl facts.jsonl --singles --facts 200
    """
    from ..bench.evaluation import bench_answers, bench_singles
    from ..engine.datasets import read_facts
    from ..engine.prompts import read_contexts
    from ..engine.session import EditSession

    wanted = read_facts(data, facts, convention)
    templates = None if contexts is None else read_contexts(contexts)
    loaded = common.load(model, dtype, device)
    with common.bars() as listener:
        if singles:
            result = bench_singles(
                loaded,
                wanted,
                lambda: EditSession(loaded, method, preset, stats, contexts=templates),
                context or "question-only",
                listener,
            )
        else:
            result = bench_answers(loaded, wanted, serial, context or "qa_inst", listener)
    if json:
        common.print_json(result)
    else:
        _evaluation_table(result)
    if result["check"] != "passed":
        raise typer.Exit(1)


def _evaluation_table(result: dict[str, Any]) -> None:
    console = common.console()
    console.print(f"{result['about']['device']}, {result['model']}: check {result['check']}", highlight=False)
    for kind, what in (("flips", "a tie that went the other way"), ("wrong", "not the same")):
        for each in result[kind]:
            where = "log-probabilities" if each["token"] is None else f"at token {each['token']} the two best logits"
            print(f"{what}: {each['prompt']!r}, {where} {each['gap']:.1e} apart")
    table = Table("", "shape", "seconds", "baseline, s", "ratio")
    for row in result["rows"]:
        shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
        table.add_row(row["name"], shape, *(f"{row[key]:.3g}" for key in ("seconds", "baseline_seconds", "ratio")))
    console.print(table)


Only = Annotated[list[str] | None, typer.Option("--only", metavar="NAME", help="One operation; may be repeated.")]


@bench.command("solve")
def solve(
    d: Annotated[int, typer.Option(min=64, help="Width of the keys.")] = 1600,
    n: Annotated[int, typer.Option(min=1, help="Keys (facts); under a quarter of the width.")] = 50,
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """MEMIT and AlphaEdit in the number of keys against the published dense LU, and small systems in one call.

    Example: rewire bench solve --d 6400 --n 200
    """
    from ..bench.solve import bench_solve
    from ..engine.model import pick_device
    from ..kernels.errors import InputError

    if 4 * n >= d:
        raise InputError(f"--n {n}: expected fewer than a quarter of --d {d}; more are solved as one dense system")
    with common.bars() as listener:
        result = bench_solve(d, n, pick_device(device), lambda done, total: listener("solve", done, total))
    if json:
        common.print_json(result)
    else:
        console = common.console()
        condition = f"condition at least {result['condition']:.0e}, worst residual {result['worst']:.0e}"
        console.print(f"check {result['check']}: {condition}", highlight=False)
        table = Table("solve", "shape", "ms", "published ms", "ratio", "to its LU alone", "made before, s", "with it")
        for row in result["rows"]:
            shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
            milliseconds = (f"{1e3 * row[key]:.3g}" for key in ("seconds", "baseline_seconds"))
            ratios = (f"{row[key]:.1f}" for key in ("ratio", "ratio_to_lu"))
            before = (f"{row['factor_seconds']:.3g}", f"{row['ratio_with_factor']:.2f}")
            table.add_row(row["name"], shape, *milliseconds, *ratios, *before)
        console.print(table)
    if result["check"] != "passed":
        raise typer.Exit(1)


@bench.command("kernels")
def kernels(
    only: Only = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="bfloat16, float16, float32 or float64; may be repeated.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Put the rows into this CSV, each in the place of its last.")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="To time each provider for, at each shape.")] = 0.5,
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Every operation against plain torch and the best library calls; what is not right is not timed.

    Example: rewire bench kernels --only gram_ --csv kernels.csv
    """
    from ..bench.kernels import bench_kernels

    with common.bars() as listener:
        result = bench_kernels(device, only or (), dtype or (), csv, seconds, listener)
    if json:
        common.print_json(result)
    else:
        _kernels_table(result)
    if result["check"] != "passed":
        raise typer.Exit(1)


@bench.command("gpu")
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json, gpu.md, kernels.csv and tuned.json.")],
    budget: Annotated[float, typer.Option(help="Seconds; what does not fit is listed.")] = 540,
    only: Only = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Walk all of it on the CPU, at small shapes.")] = False,
    json: common.Json = False,
) -> None:
    """On a GPU: gates C, the chip's ceilings, kernels at real shapes, statistics, values, tuning; inside ten minutes.

    Example: rewire bench gpu --out gpu-report
    """
    from ..bench.gpu import bench_gpu, say_lines
    from ..bench.gpu_report import markdown

    with common.bars() as listener:
        report = bench_gpu(out, budget, only or (), rehearse, listener if sys.stdout.isatty() else say_lines())
    if json:
        common.print_json(report)
    else:
        print(markdown(report))
        print(f"written to {out}; export REWIRE_TUNED={shlex.quote(str(out / 'tuned.json'))} launches what was fastest")
    if report["check"] != "passed":
        raise typer.Exit(1)


@bench.command("plot")
def plot(
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="What `rewire bench kernels --csv` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")],
    json: common.Json = False,
) -> None:
    """Bars of the ratio to plain torch and of the share of the floor, from the CSV only.

    Example: rewire bench plot kernels.csv --out pictures
    """
    from ..bench.plots import plot

    written = [str(path) for path in plot(csv, out)]
    if json:
        common.print_json({"written": written})
    else:
        print("\n".join(written))


def _kernels_table(result: dict[str, Any]) -> None:
    console = common.console()
    console.print(f"{result['about']['device']}: check {result['check']}", highlight=False)
    table = Table("operation", "provider", "dtype", "shape", "ms", "p20", "p80", "ratio", "of the floor", "peak MiB")
    for row in result["rows"]:
        figures = (
            *(f"{1e3 * row[key]:.3g}" for key in ("seconds", "p20", "p80")),
            *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("ratio", "floor_fraction")),
            f"{row['peak_bytes'] / 2**20:.1f}",
        )
        shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
        table.add_row(row["name"], row["provider"], row["dtype"], shape, *figures)
    console.print(table)
    for kind, title in (("wrong", "wrong"), ("not_measured", "not measured")):
        reasons = dict.fromkeys((row["name"], row["provider"], row["note"]) for row in result[kind])
        for name, provider, note in reasons:
            print(f"{title}: {name} by {provider}: {note}")


def _statistics_table(result: dict[str, Any]) -> None:
    console = common.console()
    console.print(f"{result['device']}, {result['model']}: check {result['check']}", highlight=False)
    for dtype, error in result["errors"].items():
        print(f"{dtype}: furthest from the published structure by {'NaN' if error is None else format(error, '.1e')}")
    table = Table(
        "forward", "tokens", "seconds", "published", "ratio", "tokens/s", "of the floor", "peak MiB", "published"
    )
    for row in result["rows"]:
        peaks = (f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "baseline_peak_bytes"))
        fraction = "-" if row["floor_fraction"] is None else f"{row['floor_fraction']:.2f}"
        table.add_row(
            row["dtype"], str(row["shape"]["tokens"]), f"{row['seconds']:.2f}", f"{row['baseline_seconds']:.2f}",
            f"{row['ratio']:.2f}", f"{row['tokens_per_second']:,.0f}", fraction, *peaks,
        )  # fmt: skip
    console.print(table)
    if any(row["dtype"] == "bfloat16" and row["bf16_instructions"] is False for row in result["rows"]):
        print("this processor has no bfloat16 instructions: they are computed by way of float32")


def _throughput_table(report: dict[str, Any]) -> None:
    console = common.console()
    console.print(f"{report['about']['device']}, {report['model']}: check {report['check']}", highlight=False)
    for name, error in report["errors"].items():
        print(f"{name}: furthest from the serial baseline by {'NaN' if error is None else format(error, '.1e')}")
    if report["near_ties"]:
        print(f"not compared, their loss is a near-tie with the stop: {', '.join(report['near_ties'])}")
    for note in report["notes"]:
        print(note)
    if report["check"] != "passed":
        return
    print(f"{report['facts']} facts, {report['steps']:.1f} steps each, layers {report['layers']}")
    table = Table("phase", "seconds", "TFLOP", "counted", "GB", "floor, s", "of the floor", "peak MiB", "serial, s", "")
    for row in report["phases"]:
        if "flops" not in row:
            given = "given: " if row["status"] == "given" else ""
            table.add_row(row["name"], _figure(row.get("seconds")), *["-"] * 7, given + row["note"])
            continue
        figures = (
            f"{row['seconds']:.3g}", f"{row['flops'] / 1e12:.3g}", _figure(row["counted_flops_ratio"]),
            f"{row['bytes'] / 1e9:.3g}", _figure(row["floor_seconds"]), _figure(row["floor_fraction"]),
            f"{row['peak_bytes'] / 2**20:.0f}", _figure(row["serial_seconds"]),
        )  # fmt: skip
        table.add_row(row["name"], *figures, "")
    console.print(table)
    table = Table(
        "", "facts/s", "seconds", f"serial, s (from {report['serial_facts']} facts)", "ratio", "by FLOPs", "peak MiB"
    )
    for row in report["rows"]:
        table.add_row(
            row["name"], f"{row['facts_per_second']:.3g}", f"{row['seconds']:.3g}", f"{row['baseline_seconds']:.3g}",
            f"{row['ratio']:.2f}", _figure(row["flops_ratio"]), f"{row['peak_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    console.print(table)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
