"""The ecosystem's npz of a second moment, as published MEMIT code and all that came from it write and read it."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ..kernels.errors import InputError
from .moments import Moment, unpack
from .triangles import Header

# published code writes None as this NaN; numpy keeps its bits
_NONE = np.frombuffer(np.uint64(0xFFF8000000000002).tobytes(), dtype=np.float64)[0]
_NEEDED = ("mom2.mom2", "mom2.count")


def read_header(path: Path) -> Header:
    """What an npz holds, without its numbers. Raises `InputError` where it is broken or no second moment."""
    with _members(path) as archive:
        with archive.open("mom2.mom2.npy") as member:
            version = npy.read_magic(member)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(member)
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
            raise InputError(f"{path}: mom2.mom2 of shape {shape} found, expected a square matrix")
        if dtype.kind != "f":
            raise InputError(f"{path}: mom2.mom2 holds {dtype}, expected float32")
        documents = _integer(archive, "sample_size") if "sample_size.npy" in archive.namelist() else None
        return Header(shape[0], _integer(archive, "mom2.count"), documents)


def read_sum(path: Path) -> Tensor:
    """The un-normalised sum [d, d], float32 or as stored in float64, both triangles; checked for what it should be."""
    with _members(path) as archive, archive.open("mom2.mom2.npy") as member:
        total = npy.read_array(member, allow_pickle=False)
        member.read(1)  # the end, where the checksum is compared
    total = np.ascontiguousarray(total, dtype=np.float64 if total.itemsize > 4 else np.float32)
    diagonal = total.diagonal()
    if not np.isfinite(total).all():
        raise InputError(f"{path}: NaN or Inf in mom2.mom2, expected finite values; collect them anew")
    if (diagonal < 0).any():
        raise InputError(f"{path}: negative diagonal in mom2.mom2, expected sums of squares; collect them anew")
    some = slice(None, None, max(1, len(total) // 64))  # 64 rows against their columns: a lone triangle, garbage show
    rounding = 1e-3 * np.sqrt(np.outer(diagonal[some], diagonal))
    if (abs(total[some] - total[:, some].T) > rounding).any():
        raise InputError(f"{path}: mom2.mom2 is not symmetric, expected a second moment; collect them anew")
    return torch.from_numpy(total)


def write(file: IO[bytes], moment: Moment) -> None:
    """Members stored, not deflated; the sum as a full float32 matrix; no documents as published code boxes None."""
    documents = _NONE if moment.documents is None else np.int64(moment.documents)
    members: dict[str, Any] = {
        "mom2.constructor": np.array("rewire.stats.moments.SecondMoment()"),
        "mom2.count": np.array(moment.count, dtype=np.int64),
        "mom2.mom2": unpack(moment.triangle, dtype=torch.float32).numpy(),
        "sample_size": np.array(documents),
    }
    np.savez(file, **members)


@contextmanager
def _members(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, with all that can be wrong about it told in one line."""
    try:
        with path.open("rb") as file:
            if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
                raise InputError(f"{path}: holds a single array; expected an npz with mom2.mom2 and mom2.count")
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            for name in _NEEDED:
                if name not in held:
                    kinds = sorted({member.split(".")[0] for member in held if "." in member} - {"mom2"})
                    what = f"statistics called {', '.join(kinds)}" if kinds else ", ".join(held) or "nothing"
                    raise InputError(
                        f"{path}: no {name} in it (found {what}); expected the npz of a second moment (mom2)"
                    )
            yield archive
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the npz of a second moment") from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: truncated or broken, no npz ({reason}); fetch or collect it anew") from None


def _integer(archive: zipfile.ZipFile, name: str) -> int | None:
    """None for anything else, such as the NaN that published code writes for Python's None."""
    with archive.open(f"{name}.npy") as file:
        member = npy.read_array(file, allow_pickle=False)
    if member.size != 1 or member.dtype.kind not in "iuf" or not np.isfinite(member).all():
        return None
    return int(member.item())
