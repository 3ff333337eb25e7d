"""Second moments on disk: the npz layout of the ecosystem, with a JSON sidecar that says what the numbers belong to.

The layout is that of the published MEMIT code and all that came from it; docs/formats.md describes both files.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..kernels.errors import InputError
from .moments import Moment

# {layer}_{dtype}_mom2_{documents}.npz; `_t{cap}` stands before the documents (published code, at times the literal
# "_t{batch_tokens}") or behind them (ours); published code leaves out the documents where all were taken
_NAME = re.compile(r"(?P<layer>.+)_[a-z]+\d+_mom2(_t(\d+|{\w+}))?(_(?P<documents>\d+))?(_t\d+)?\.npz")


def file_name(layer: str, dtype: str, documents: int, max_length: int | None) -> str:
    """dtype: of the keys, e.g. "bfloat16"; the stored sum is float32 whatever it says."""
    return f"{layer}_{dtype}_mom2_{documents}" + ("" if max_length is None else f"_t{max_length}") + ".npz"


def list_layer(folder: Path, layer: str) -> list[Path]:
    """The files in `folder` that are named as this layer's statistics, sorted; none where there is no folder."""
    return [path for path in _npz_files(folder) if (name := _NAME.fullmatch(path.name)) and name["layer"] == layer]


def write(path: Path, moment: Moment, about: dict[str, Any]) -> None:
    """`path` (npz) and its sidecar, each to a temporary name and renamed. The folder must exist.

    The old sidecar goes first and the new one comes last: whenever the process dies, a sidecar that is there belongs to
    the npz beside it, and an npz without one is no hit in the cache.
    """
    sidecar = path.with_suffix(".json")
    members = {
        "mom2.constructor": np.array("rewire.stats.moments.SecondMoment()"),
        "mom2.count": np.array(moment.count, dtype=np.int64),
        "mom2.mom2": moment.sum.numpy(),
        "sample_size": np.array(moment.documents, dtype=np.int64),
    }
    sidecar.unlink(missing_ok=True)
    _replace(path, lambda file: np.savez(file, **members))  # type: ignore[arg-type]
    _replace(sidecar, lambda file: file.write(json.dumps(about, indent=1).encode()))


def _replace(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What is said about the npz at `path`; None where nothing is. Raises `InputError` where that is no JSON object."""
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


def read_npz(path: str | Path, width: int, fingerprint: str | None = None) -> Moment:
    """The statistics in one npz, checked.

    width: d_in of the layer that they are for
    fingerprint: of the model's weights; compared where a sidecar lies beside the file
    Raises `InputError` where it is broken, no second moment, of another model or width, or of fewer than 2 d_in tokens.
    """
    path = Path(path)
    name = _NAME.fullmatch(path.name)
    layer = f"layer {name['layer']}" if name else "layer"
    about = read_sidecar(path) or {}
    if fingerprint is not None and about.get("fingerprint", fingerprint) != fingerprint:
        raise InputError(
            f"{path}: statistics of another model: of {about.get('model')} (weights {about['fingerprint']}), the model "
            f"has weights {fingerprint}; collect them anew"
        )
    members = _members(path)
    total, count = members["mom2.mom2"], _integer(members["mom2.count"])
    if total.ndim != 2 or total.shape[0] != total.shape[1]:
        raise InputError(f"{path}: mom2.mom2 of shape {total.shape} found, expected a square matrix of width {width}")
    if len(total) != width:
        raise InputError(f"{path}: statistics of width {len(total)} found, the model's {layer} has {width}")
    if total.dtype.kind != "f":
        raise InputError(f"{path}: mom2.mom2 holds {total.dtype}, expected float32")
    if count is None or count < 2 * width:
        raise InputError(f"{path}: statistics of {count} tokens found, {layer} of width {width} needs {2 * width}")
    if about.get("tokens", count) != count:
        raise InputError(f"{path}: holds {count} tokens, its sidecar says {about['tokens']}; collect them anew")
    total = np.ascontiguousarray(total, dtype=np.float32)
    diagonal = total.diagonal()
    if not np.isfinite(total).all():
        raise InputError(f"{path}: NaN or Inf in mom2.mom2, expected finite values; collect them anew")
    if (diagonal < 0).any():
        raise InputError(f"{path}: negative diagonal in mom2.mom2, expected sums of squares; collect them anew")
    some = slice(None, None, max(1, width // 64))  # 64 rows against their columns: a lone triangle, or garbage, shows
    rounding = 1e-3 * np.sqrt(np.outer(diagonal[some], diagonal))
    if (abs(total[some] - total[:, some].T) > rounding).any():
        raise InputError(f"{path}: mom2.mom2 is not symmetric, expected a second moment; collect them anew")
    documents = _integer(members["sample_size"]) if "sample_size" in members else None
    return Moment(torch.from_numpy(total), count, documents, str(path))


def _members(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: holds a single array; expected an npz with mom2.mom2 and mom2.count")
        with archive:
            for name in ("mom2.mom2", "mom2.count"):
                if name not in archive.files:
                    held = ", ".join(archive.files) or "nothing"
                    raise InputError(f"{path}: no {name} in it (found {held}); expected the npz of a second moment")
            wanted = ("mom2.mom2", "mom2.count", "sample_size")
            return {name: archive[name] for name in wanted if name in archive.files}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the npz of a second moment") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: truncated or broken, no npz ({reason}); fetch or collect it anew") from None


def _integer(member: np.ndarray) -> int | None:
    """None for anything else, such as the NaN that published code writes for Python's None."""
    if member.size != 1 or member.dtype.kind not in "iuf" or not np.isfinite(member).all():
        return None
    return int(member.item())


def find(directory: str | Path, layer: str, model: str = "", n_samples: int | None = None) -> Path:
    """Where a user's `directory` has the statistics of a layer: in itself, in {ds}_stats/ or in {model}/{ds}_stats/.

    layer: name of the module, e.g. "transformer.h.1.mlp.c_proj"
    model: its name; {model} is the last component of it, or all of it with "/" as "_"
    n_samples: decides between several; a single file is taken whatever its number of documents
    Raises `InputError` where there is none, or several and `n_samples` does not decide.
    """
    top = Path(directory)
    if not top.is_dir():
        raise InputError(f"{top}: no such folder; expected one with statistics ({layer}_float32_mom2_*.npz)")
    schemes = dict.fromkeys(name for name in (model.rstrip("/").split("/")[-1], model.replace("/", "_")) if name)
    parents = [top, *(top / name for name in schemes)]
    folders = [top, *(folder for parent in parents if parent.is_dir() for folder in sorted(parent.glob("*_stats/")))]
    found = [path for folder in folders for path in list_layer(folder, layer)]
    exact = [path for path in found if _NAME.fullmatch(path.name)["documents"] == str(n_samples)]  # type: ignore[index]
    if len(exact) == 1 or len(found) == 1:
        return (exact or found)[0]
    if found:
        raise InputError(
            f"{top}: several statistics for {layer}: {_some(top, found)}; expected one: name the folder that holds it, "
            "or set mom2_n_samples to its number"
        )
    others = [path for folder in folders for path in _npz_files(folder)] or sorted(top.iterdir())
    places = ", ".join(["there", "*_stats/", *(f"{name}/*_stats/" for name in schemes)])
    raise InputError(
        f"{top}: no statistics for {layer} (looked for {layer}_float32_mom2_*.npz in: {places}); "
        f"found {_some(top, others) or 'nothing'}"
    )


def _npz_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".npz") if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from None


def _some(top: Path, paths: list[Path]) -> str:
    names = [str(path.relative_to(top)) for path in paths[:4]]
    return ", ".join(names) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
