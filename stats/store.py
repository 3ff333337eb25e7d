"""Second moments on disk: our safetensors, or the ecosystem's npz, each with a JSON sidecar that says what the numbers
belong to. docs/formats.md describes all three.
"""

import json
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError
from . import npz, triangles
from .cache import new_file
from .moments import Moment
from .names import SUFFIXES, file_name, find, layers_in, list_layer, parse_name
from .triangles import Header

__all__ = [
    "Header", "file_name", "find", "layers_in", "list_layer", "read", "read_header", "read_sidecar", "write",
]  # fmt: skip


def write(path: Path, moment: Moment, about: dict[str, Any]) -> None:
    """`path`, by its suffix, and its sidecar. The folder must exist.

    Both are written to temporary names before anything is touched; then the old sidecar goes first and the new one
    comes last: whenever the process dies, a sidecar that is there belongs to the file beside it, and a file without one
    is no hit in the cache.

    Raises `OSError` with the file's name, and leaves all as it was, where it cannot be written, e.g. on a full disk.
    """
    sidecar = path.with_suffix(".json")
    fill = triangles.write if _is_ours(path) else npz.write
    said = json.dumps(about, indent=1).encode()
    words_of = new_file(sidecar, lambda file: file.write(said))
    with new_file(path, lambda file: fill(file, moment)) as data, words_of as words:
        sidecar.unlink(missing_ok=True)
        data.replace(path)
        words.replace(sidecar)


def read(path: str | Path, width: int | None = None, fingerprint: str | None = None) -> Moment:
    """The statistics in one file, npz or safetensors by its suffix, checked.

    width: d_in of the layer that they are for, of which they must hold at least 2 d_in tokens; None: they may be any
    fingerprint: of the model's weights; compared where a sidecar lies beside the file
    Raises `InputError` where it is broken, no second moment, of another model or width, or of too few tokens, or where
    its sidecar says something else than its name or its content.
    """
    path = Path(path)
    name = parse_name(path)
    layer = f"layer {name.layer}" if name else "layer"
    about = read_sidecar(path) or {}
    if fingerprint is not None and about.get("fingerprint", fingerprint) != fingerprint:
        raise InputError(
            f"{path}: statistics of another model: of {about.get('model')} (weights {about['fingerprint']}), the model "
            f"has weights {fingerprint}; collect them anew"
        )
    header = read_header(path)
    count = header.tokens
    if width is not None and header.width != width:
        raise InputError(f"{path}: statistics of width {header.width} found, the model's {layer} has {width}")
    least = 1 if width is None else 2 * width
    if count is None or count < least:
        needs = "expected at least one" if width is None else f"{layer} of width {width} needs {least}"
        raise InputError(f"{path}: statistics of {count} tokens found, {needs}")
    if about.get("tokens", count) != count:
        raise InputError(f"{path}: holds {count} tokens, its sidecar says {about['tokens']}; collect them anew")
    if name and about.get("layer", name.layer) != name.layer:
        raise InputError(f"{path}: named after {layer}, its sidecar says {about['layer']}; was it renamed?")
    if _is_ours(path):
        moment = Moment(triangles.read_triangle(path), count, header.documents, str(path))
        if about.get("digest", moment.digest) != moment.digest:
            raise InputError(
                f"{path}: its sidecar is of other numbers (digest {about['digest']}, found {moment.digest}); "
                "collect them anew"
            )
        return moment
    return Moment.of(npz.read_sum(path), count, header.documents, str(path))


def read_header(path: str | Path) -> Header:
    """Width, tokens and documents, without the numbers: cheap. Raises `InputError` as `read` does."""
    path = Path(path)
    return triangles.read_header(path) if _is_ours(path) else npz.read_header(path)


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What is said about the file at `path`; None where nothing is. Raises `InputError` where it is no JSON object."""
    sidecar = path.with_suffix(".json")
    try:
        about = json.loads(sidecar.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{sidecar}: cannot be read ({error}); expected the sidecar of {path.name}") from None
    if not isinstance(about, dict):
        raise InputError(f"{sidecar}: found {type(about).__name__}, expected a JSON object, the sidecar of {path.name}")
    return about


def _is_ours(path: Path) -> bool:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file that ends in {' or '.join(SUFFIXES)}")
    return path.suffix == SUFFIXES[0]
