"""Our own file of a second moment: the lower triangle in float64, as large as the ecosystem's full float32 matrix."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.errors import InputError
from .moments import Moment, width_of

FORMAT = "rewire-moment-1"


@dataclass(frozen=True)
class Header:
    """What a file of either kind says without its numbers being read. tokens: None where it holds no such number."""

    width: int
    tokens: int | None
    documents: int | None


def read_header(path: Path) -> Header:
    """Raises `InputError` where the file is cut off or holds something else."""
    with _opened(path) as file:
        metadata, held = file.metadata() or {}, list(file.keys())
        if metadata.get("format") != FORMAT or held != ["triangle"]:
            what = ", ".join(sorted(held)[:4]) or "nothing"
            raise InputError(
                f"{path}: format {metadata.get('format')!r} with {what} found, expected {FORMAT!r} with `triangle`"
            )
        part = file.get_slice("triangle")
        shape, dtype = part.get_shape(), part.get_dtype()
    if dtype != "F64" or len(shape) != 1:
        raise InputError(f"{path}: triangle of shape {shape} in {dtype} found, expected [d (d + 1) / 2] in F64")
    try:
        width = width_of(shape[0])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Header(width, _number(metadata.get("tokens")), _number(metadata.get("documents")))


def read_triangle(path: Path) -> Tensor:
    """[d (d + 1) / 2] float64, mapped from the file; checked to be a second moment's."""
    with _opened(path) as file:
        triangle: Tensor = file.get_tensor("triangle")
    at = torch.arange(width_of(len(triangle)))
    if not np.isfinite(triangle.numpy()).all():
        raise InputError(f"{path}: NaN or Inf in the triangle, expected finite values; collect them anew")
    if (triangle[at * (at + 3) // 2] < 0).any():
        raise InputError(f"{path}: negative diagonal in the triangle, expected sums of squares; collect them anew")
    return triangle


def write(file: IO[bytes], moment: Moment) -> None:
    """A safetensors file, byte for byte the same each time: the library orders its metadata by chance."""
    triangle = moment.triangle.contiguous().numpy()
    metadata = {"format": FORMAT, "tokens": str(moment.count)}
    if moment.documents is not None:
        metadata["documents"] = str(moment.documents)
    entry = {"dtype": "F64", "shape": list(triangle.shape), "data_offsets": [0, triangle.nbytes]}
    header: dict[str, Any] = {"__metadata__": metadata, "triangle": entry}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    file.write(triangle.data)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a second moment") from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: truncated or broken, no safetensors ({reason}); collect it anew") from None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
