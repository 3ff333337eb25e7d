"""Where files of second moments lie and what they are called: the ecosystem's names, and finding them again."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..kernels.errors import InputError

SUFFIXES = (".safetensors", ".npz")  # ours, which is taken where both lie there, and the ecosystem's
SCHEMES = ("last", "whole")

# {layer}_{dtype}_mom2_{documents}; `_t{cap}` stands before the documents (published code, at times the literal
# "_t{batch_tokens}") or behind them (ours); published code leaves out the documents where all were taken, and joins
# the sorted names of several statistics by "-"
_CAP = r"(?:_t(?:(?P<%s>\d+)|{\w+}))?"
_NAME = re.compile(
    r"(?P<layer>.+)_(?P<dtype>[a-z]+\d+)_(?:mean-)?mom2(?:-norm_mean)?"
    rf"{_CAP % 'before'}(?:_(?P<documents>\d+))?{_CAP % 'behind'}\.(?:npz|safetensors)"
)


@dataclass(frozen=True)
class Name:
    """What a file's name says. documents, max_length: None where it says nothing (all, or unknown)."""

    layer: str
    dtype: str
    documents: int | None
    max_length: int | None


def parse_name(path: Path | str) -> Name | None:
    """None for what is not called as second moments are."""
    found = _NAME.fullmatch(Path(path).name)
    if not found:
        return None
    documents, cap = (int(text) if text else None for text in (found["documents"], found["before"] or found["behind"]))
    return Name(found["layer"], found["dtype"], documents, cap)


def file_name(
    layer: str, dtype: str, documents: int | None, max_length: int | None, suffix: str = ".safetensors"
) -> str:
    """dtype: of the keys, e.g. "bfloat16"; what is stored is float64 (.safetensors) or float32 (.npz) all the same."""
    parts = [f"{layer}_{dtype}_mom2"]
    parts += [] if documents is None else [f"{documents}"]
    parts += [] if max_length is None else [f"t{max_length}"]
    return "_".join(parts) + suffix


def model_folder(model: str, scheme: str = "last") -> str:
    """What published code calls a model's folder: the last component of its name, or all of it with "/" as "_"."""
    model = model.rstrip("/")
    return model.split("/")[-1] if scheme == "last" else model.replace("/", "_")


def ecosystem_path(
    root: Path, model: str, dataset: str, layer: str, documents: int | None, scheme: str = "last"
) -> Path:
    """Where published code looks for a layer: {root}/{model}/{dataset}_stats/{layer}_float32_mom2_{documents}.npz.

    scheme: of {model}: "last" (EasyEdit and its line) or "whole" (the first published code)
    """
    name = file_name(layer, "float32", documents, None, ".npz")
    return root / model_folder(model, scheme) / f"{dataset}_stats" / name


def layer_number(layer: str) -> int | None:
    """13 for "transformer.h.13.mlp.c_proj"; None where there is no number in it."""
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def natural(layer: str) -> list[tuple[int, str]]:
    """Sort key: h.2 before h.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", layer)]


def list_layer(folder: Path, layer: str) -> list[Path]:
    """The files in `folder` that are named as this layer's statistics, sorted; none where there is no folder.

    Of an npz and a safetensors that differ in nothing else the latter is listed.
    """
    return [path for path in _listed(folder) if _parsed(path).layer == layer]


def layers_in(directory: str | Path, model: str = "") -> dict[str, list[Path]]:
    """Layer name -> its files, of all that are in a directory (or of one file), layers in the order of their numbers.

    Looked for as `find` does, and without a name of the model also in {any}/{ds}_stats/, where only one model has some.
    Raises `InputError` where there is nothing, or statistics of several models.
    """
    top = Path(directory)
    if top.is_file():
        name = parse_name(top)
        if name is None:
            raise InputError(f"{top}: is not named as statistics are; expected {{layer}}_{{dtype}}_mom2_{{documents}}")
        return {name.layer: [top]}
    folders = _folders(top, model)
    paths = [path for folder in folders for path in _listed(folder)]
    if not paths and not model:
        below: dict[str, list[Path]] = {}
        for folder in sorted(top.glob("*/*_stats/")):
            below.setdefault(folder.parent.name, []).extend(_listed(folder))
        holding = [name for name, found in below.items() if found]
        if len(holding) > 1:
            raise InputError(f"{top}: statistics of several models: {', '.join(holding)}; name the folder of one")
        paths = below[holding[0]] if holding else []
    if not paths:
        raise _nothing(top, folders, model, "a layer")
    result: dict[str, list[Path]] = {}
    for path in paths:
        result.setdefault(_parsed(path).layer, []).append(path)
    return {layer: result[layer] for layer in sorted(result, key=natural)}


def find(directory: str | Path, layer: str, model: str = "", n_samples: int | None = None) -> Path:
    """Where a user's `directory` has the statistics of a layer: in itself, in {ds}_stats/ or in {model}/{ds}_stats/.

    layer: name of the module, e.g. "transformer.h.1.mlp.c_proj"
    model: its name; {model} is the last component of it, or all of it with "/" as "_"
    n_samples: decides between several; a single file is taken whatever its number of documents
    Raises `InputError` where there is none, or several and `n_samples` does not decide.
    """
    top = Path(directory)
    folders = _folders(top, model)
    found = [path for folder in folders for path in list_layer(folder, layer)]
    exact = [path for path in found if n_samples is not None and _parsed(path).documents == n_samples]
    if len(exact) == 1 or len(found) == 1:
        return (exact or found)[0]
    if found:
        raise InputError(
            f"{top}: several statistics for {layer}: {_some(top, found)}; expected one: name the folder that holds it, "
            "or set mom2_n_samples to its number"
        )
    raise _nothing(top, folders, model, layer)


def _folders(top: Path, model: str) -> list[Path]:
    if not top.is_dir():
        raise InputError(f"{top}: no such folder; expected one with statistics (*_mom2_*.safetensors or .npz)")
    parents = [top, *(top / name for name in _model_folders(model))]
    return [top, *(folder for parent in parents if parent.is_dir() for folder in sorted(parent.glob("*_stats/")))]


def _model_folders(model: str) -> list[str]:
    return list(dict.fromkeys(name for scheme in SCHEMES if (name := model_folder(model, scheme))))


def _nothing(top: Path, folders: list[Path], model: str, layer: str) -> InputError:
    others = [path for folder in folders for path in _files(folder)] or sorted(top.iterdir())
    places = ", ".join(["there", "*_stats/", *(f"{name}/*_stats/" for name in _model_folders(model))])
    named = "{layer}" if layer == "a layer" else layer
    return InputError(
        f"{top}: no statistics for {layer} (looked for {named}_float32_mom2_*.safetensors or .npz in: {places}); "
        f"found {_some(top, others) or 'nothing'}"
    )


def _parsed(path: Path) -> Name:
    name = parse_name(path)
    assert name is not None  # of what `_listed` lists
    return name


def _listed(folder: Path) -> list[Path]:
    """The files of second moments in a folder, ours before an npz of the same name."""
    found: dict[str, Path] = {}
    for path in sorted(_files(folder), key=lambda path: SUFFIXES.index(path.suffix)):
        if parse_name(path):
            found.setdefault(path.name.removesuffix(path.suffix), path)
    return sorted(found.values())


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from None


def _some(top: Path, paths: list[Path]) -> str:
    names = [str(path.relative_to(top)) for path in paths[:4]]
    return ", ".join(names) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
