"""`rewire stats`: second moments of a model's keys, collected, looked at, checked, converted, added up, fetched."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..kernels.errors import InputError
from . import common

PLACES = ("auto", "device", "cpu", "disk")
TYPICAL = 256  # tokens of a document, until the corpus' own mean is known

stats = typer.Typer(help="Second moments: collect, show, verify, convert, merge, pull.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of second moments, or one file.")]
NewOut = Annotated[Path, typer.Option("--out", help="Folder to write into; made where it is not there.")]
Named = Annotated[str, typer.Option("--model", metavar="NAME", help="Name of the model that they are of.")]


@stats.callback()
def group() -> None:
    """Second moments of a model's keys: what an edit must leave alone."""


@stats.command("collect")
def collect(
    model: common.ModelName,
    corpus: Annotated[
        str, typer.Argument(metavar="CORPUS", help="Text, .json, .jsonl (also .gz), parquet, or a `datasets` id.")
    ],
    layers: Annotated[
        str | None, typer.Option(metavar="3,4,5", help="Blocks; default: those of the model's MEMIT preset.")
    ] = None,
    module: Annotated[
        list[str] | None, typer.Option(help="Any linear map by its path, instead; may be repeated.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Token budget; default: the preset's, or 20 a column.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Document budget, such as 100000.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Stop when the moments have settled to this, such as 0.01.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens kept of a document's start; default: the preset's, or 512.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the order in which documents are drawn; default: the preset's, or 0.")
    ] = None,
    in_order: Annotated[bool, typer.Option("--in-order", help="Documents in the corpus' own order.")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Every N-th document only, from the I-th.")] = "1/1",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files; default: the cache, where edits find them.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a `datasets` id.")] = None,
    split: Annotated[str, typer.Option(help="Split of a `datasets` id.")] = "train",
    accumulate: Annotated[str, typer.Option(help="Where the running sums live: auto, device, cpu or disk.")] = "auto",
    checkpoint_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens between two checkpoints; default: a minute's worth.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    json: common.Json = False,
) -> None:
    """Collect second moments of all wanted layers in one pass; interrupted, the same command goes on.

    Several GPUs or machines: torchrun --no-python --nproc-per-node 8 rewire stats collect ...

    Example: rewire stats collect gpt2-xl wikipedia.jsonl --tokens 1000000
    """
    import torch

    from ..bench.ceilings import quick
    from ..engine.statistics import best_rate, parse_layers, second_moments, wanted
    from ..stats import cache_root, read_corpus
    from ..stats.collect import Budget
    from ..stats.ranks import join

    # what can be known to be wrong is said before the model is loaded
    numbers, part = parse_layers(layers), _shard(shard)
    if accumulate not in PLACES:
        raise InputError(f"--accumulate {accumulate}: expected {', '.join(PLACES)}")
    for one, other, both in (
        ("--layers", "--module", numbers and module),
        ("--seed", "--in-order", seed is not None and in_order),
    ):
        if both:
            raise InputError(f"{one} and {other}: name the one or the other")
    text = read_corpus(corpus, config, split)
    ranks = join()
    loaded = common.load(model, dtype, device, quantize)
    asked = wanted(loaded, numbers, module, Budget(max_length, samples, tokens, tolerance), seed, in_order)
    rates = quick(loaded.device, {torch.float32, next(loaded.hf.parameters()).dtype})

    def best(length: int) -> float | None:
        return best_rate(loaded, asked.modules, length, lambda cost, kind: rates.floor(cost, kind, loaded.device))

    with common.bars({"tokens": best(TYPICAL)}) as listener:
        found = second_moments(
            loaded,
            asked.modules,
            text,
            asked.budget,
            seed=asked.seed,
            shard=part,
            out=out,
            place=accumulate,
            checkpoint_tokens=checkpoint_tokens,
            ranks=ranks,
            progress=lambda done, total: listener("tokens", done, total),
        )
    if not ranks.first:
        return
    if any(of.source == "collected" for of in found.values()):  # which an edit may do, that needs them only once
        raise InputError(
            f"{cache_root()}: these statistics could not be written there and are gone but for their last checkpoint; "
            "make room, set REWIRE_CACHE or name a folder (--out), and collect them again"
        )
    some = max(found.values(), key=lambda of: of.seconds)  # one that was collected now, if any was
    result: dict[str, Any] = {
        "layers": [
            {"layer": name, "width": of.width, "tokens": of.count, "documents": of.documents, "file": of.source}
            for name, of in found.items()
        ],
        "seconds": some.seconds or None,  # none: all of them were there
    }
    if some.seconds:
        rate, at_best = some.count / some.seconds, best(max(1, some.count // (some.documents or 1)))
        result |= {"tokens_per_second": rate, "floor_fraction": at_best and rate / at_best / ranks.world}
    if json:
        common.print_json(result)
        return
    table = Table("layer", "width", "tokens", "documents")
    for row in result["layers"]:
        table.add_row(*(escape(_short(row[key])) for key in ("layer", "width", "tokens", "documents")))
    common.console().print(table)
    print(f"in {Path(some.source).parent}")
    if some.seconds:
        share = result["floor_fraction"]
        of_best = f", {100 * share:.0f} % of what this machine's products allow" if share else ""
        print(f"{some.seconds:.1f} s, {rate:,.0f} tokens/s{of_best}")
    else:
        print("all of them were there already")
    if module is None and quantize is None and part == (0, 1):
        # others may come to lie in that folder
        words = ["--stats", str(Path(some.source).parent), "--set", f"mom2_n_samples={some.documents}"]
        if asked.modules != wanted(loaded).modules:
            words += ["--set", f"layers=[{layers}]"]
        if dtype != "auto":
            words += ["--dtype", dtype]
        print(f"an edit takes them:  {shlex.join(['rewire', 'edit', model, 'FACTS', *words, '--out', 'DIR'])}")


@stats.command("show")
def show(
    folder: Folder,
    layer: Annotated[list[str] | None, typer.Option(help="One layer's name; may be repeated.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the decay of the eigenvalues into this file.")] = None,
    model: Named = "",
    json: common.Json = False,
) -> None:
    """Tokens, spectrum, effective rank and condition of each layer's C.

    Example: rewire stats show stats/gpt2-xl --png spectrum.png
    """
    from ..stats.spectrum import plot_decay, spectrum
    from ..stats.store import layers_in, read

    files = [(name, path) for name, paths in layers_in(folder, model).items() for path in paths]
    files = [(name, path) for name, path in files if layer is None or name in layer]
    if not files:
        raise InputError(f"{folder}: no statistics of {', '.join(layer or ())}")
    found = {}
    with common.bars() as listener:
        for done, (name, path) in enumerate(files):
            label = name if [other for other, _ in files].count(name) == 1 else f"{name} ({path.name})"
            found[label] = spectrum(read(path))
            listener("spectra", done + 1, len(files))
    if png is not None:
        plot_decay(found, png)
    rows = {name: {key: value for key, value in vars(of).items() if key != "eigenvalues"} for name, of in found.items()}
    if json:
        common.print_json({"layers": rows, "png": png and str(png)})
        return
    table = Table("", *map(escape, rows))
    for key in next(iter(rows.values())):
        table.add_row(key.replace("_", " "), *(_short(row[key]) for row in rows.values()))
    common.console().print(table)
    if png is not None:
        print(f"drawn into {png}")


@stats.command("verify")
def verify(
    model: common.ModelName,
    folder: Folder,
    corpus: Annotated[str | None, typer.Option(help="Text to run the model on; default: the demo's.")] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens to run.")] = 4096,
    layers: Annotated[
        str | None, typer.Option(metavar="3,4,5", help="Of projections, in their order; default: AlphaEdit's preset.")
    ] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    json: common.Json = False,
) -> None:
    """Whether second moments, or published null-space projections (.pt), are this model's: by running it, too.

    Example: rewire stats verify gpt2-xl stats/gpt2-xl
    """
    from ..engine.editors.registry import find_method
    from ..engine.fit import verify_folder, verify_projections
    from ..engine.hparams import load_hparams
    from ..engine.model import demo_file
    from ..engine.statistics import known_layers, parse_layers
    from ..stats import read_corpus

    text = read_corpus(corpus or demo_file("corpus.txt"))
    numbers = parse_layers(layers)
    loaded = common.load(model, dtype, device, quantize)
    if folder.suffix == ".pt" or any(folder.glob("layer-*.pt")):
        kind = find_method("alphaedit").hparams
        preset, _ = load_hparams(kind, "alphaedit", loaded.name, loaded.anatomy)
        rows = verify_projections(loaded, folder, known_layers(loaded, numbers or preset.layers), text, tokens)
    else:
        with common.bars() as listener:
            rows = verify_folder(loaded, folder, text, tokens, lambda done, total: listener("layers", done, total))
    wrong = [row for row in rows if not row["fits"]]
    if json:
        common.print_json({"fits": not wrong, "layers": rows})
    else:
        table = Table("layer", "fits", "why", "tokens", "correlation", "ratio")
        for row in rows:
            figures = (_short(row[key]) for key in ("tokens", "correlation", "ratio"))
            table.add_row(escape(row["layer"]), "yes" if row["fits"] else "no", escape(row["why"]), *figures)
        common.console().print(table)
    if wrong:
        raise typer.Exit(2)


@stats.command("convert")
def convert(
    folder: Folder,
    out: NewOut,
    to: Annotated[str, typer.Option(help="safetensors (ours) or npz (the ecosystem's).")] = "safetensors",
    model: Named = "",
    dataset: Annotated[str | None, typer.Option(help="Name of the text, for {dataset}_stats/.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="Lay npz out as published code looks for them: last or whole (of the model's name)."),
    ] = None,
    json: common.Json = False,
) -> None:
    """Write second moments as the other kind of file.

    Example: rewire stats convert data/stats/gpt-j-6B --out stats/gpt-j
    """
    from ..stats.convert import convert as convert_files

    with common.bars() as listener:
        written = convert_files(
            folder, out, to, model=model, dataset=dataset, scheme=scheme,
            progress=lambda done, total: listener("files", done, total),
        )  # fmt: skip
    _written(written, json)


@stats.command("merge")
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of separately collected shards.")],
    out: NewOut,
    model: Named = "",
    json: common.Json = False,
) -> None:
    """Add second moments up, layer by layer.

    Example: rewire stats merge shard1 shard2 --out stats/whole
    """
    from ..stats.merge import merge as merge_folders

    with common.bars() as listener:
        written = merge_folders(folders, out, model=model, progress=lambda done, total: listener("layers", done, total))
    _written(written, json)


@stats.command("pull")
def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A published collection (see --list), or org/repo of the hub.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("stats"),
    layers: Annotated[str | None, typer.Option(metavar="3,4,5", help="Of these blocks only.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the hub's repository.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the published collections known by name.")] = False,
    json: common.Json = False,
) -> None:
    """Fetch published second moments from the hub.

    Example: rewire stats pull gpt2-xl --out stats
    """
    from ..engine.statistics import parse_layers
    from ..stats.pull import COLLECTIONS
    from ..stats.pull import pull as pull_files

    if list_:
        rows = {known: vars(collection) for known, collection in COLLECTIONS.items()}
        if json:
            common.print_json(rows)
            return
        table = Table("name", "repository", "holds")
        for known, row in rows.items():
            table.add_row(known, row["repo"], escape(str(row["holds"])))
        common.console().print(table)
        return
    if not name:
        raise InputError("no collection named; rewire stats pull --list shows the published ones")
    _written(pull_files(name, out, layers=parse_layers(layers), revision=revision), json)


def _written(paths: list[Path], json: bool) -> None:
    if json:
        common.print_json({"written": [str(path) for path in paths]})
    else:
        print("\n".join(map(str, paths)))


def _shard(text: str) -> tuple[int, int]:
    """I/N, counted from 1 -> (i, n), from 0."""
    index, _, of = text.partition("/")
    if not (index.isdigit() and of.isdigit() and 1 <= int(index) <= int(of)):
        raise InputError(f"--shard {text}: expected I/N, from 1/N to N/N, such as 2/5")
    return int(index) - 1, int(of)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
