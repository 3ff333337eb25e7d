"""What a second moment is worked into before anything is solved, made once and kept on disk: factor and eigenbasis.

`folder`/<digest of the moment>/factor_<dtype>.safetensors and eigen.safetensors. What is read is checked against C by a
random combination of its columns, so that neither a damaged file nor one of another C can reach a weight.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.errors import InputError
from ..kernels.spd_solve import Eigenbasis, Factor, NullSpace, eigenbasis, fast_dtype, regular_factor
from ..kernels.spd_solve.dense import product
from ..kernels.spd_solve.factor import blocks
from .cache import write_whole

log = logging.getLogger(__name__)

FORMAT = "rewire-derived-1"
_STRIP = 256  # columns of a factor that are stored together
_AGREE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of a file with its C, relative; rounding stays far below

Kept = TypeVar("Kept", Factor, NullSpace)


class Derived:
    """Factors and null spaces of second moments, from the files in `folder`, else made and written there.

    A file that is broken or of something else is made anew; where nothing can be written, that is logged once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._said: set[str] = set()

    def factor(self, digest: str, C: Tensor, device: torch.device, name: str) -> Factor:
        """The `regular_factor` of C on the device, in the dtype that is fast there.

        digest: of the moment whose mean is C; C: [d, d] float32 or float64, on any device; name: of the layer
        A ridge is logged as a warning, once a layer. Raises as `regular_factor` does.
        """
        wanted = _name(fast_dtype(device))
        path = self.folder / digest / f"factor_{wanted}.safetensors"
        about = {"format": FORMAT, "kind": f"factor, {wanted} wanted", "moment": digest}
        factor = self._read(path, about, lambda content: _read_factor(content, C, wanted))
        if factor is None:
            factor = regular_factor(C.to(device))
            numbers = {"condition": repr(factor.condition), "ridge": repr(factor.ridge), "why": factor.why}
            strips = _strips(factor.L)
            tensors = {"L": ([sum(strip.numel() for strip in strips)], strips), "scale": ([len(C)], [factor.scale])}
            self._write(path, tensors, about | numbers)
        if factor.ridge:
            why = f"has no full rank ({factor.why})"
            self._warn_once(name, f"its second moment {why}: a ridge of {factor.ridge:.1e} is added to its diagonal")
        return factor.to(device)

    def null_space(self, digest: str, C: Tensor, device: torch.device, threshold: float) -> NullSpace:
        """The null space of C on the device; of an eigenbasis on disk only the side that is wanted is read.

        digest, C: as in `factor`; threshold: eigenvalues of C below it are null
        Raises `InputError` where the threshold is outside the spectrum, and as `eigenbasis` does.
        """
        d = len(C)
        path = self.folder / digest / "eigen.safetensors"
        about = {"format": FORMAT, "kind": "eigenbasis", "moment": digest}
        space = self._read(path, about, lambda content: _read_space(content, C, threshold))
        if space is None:
            eigen = eigenbasis(C.to(device))
            vectors = [eigen.vectors[rows] for rows in blocks(d, _STRIP)]
            self._write(path, {"values": ([d], [eigen.values]), "vectors": ([d, d], vectors)}, about)
            space = eigen.null_space(threshold)
        return space.to(device)

    def _read(self, path: Path, about: dict[str, str], build: Callable[[Any], Kept]) -> Kept | None:
        try:
            with safe_open(path, "pt") as content:
                found = content.metadata() or {}
                for key, expected in about.items():
                    if found.get(key) != expected:
                        raise ValueError(f"{key} {found.get(key)!r} found, expected {expected!r}")
                return build(content)
        except FileNotFoundError:
            return None
        except InputError:  # a threshold outside the spectrum
            raise
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning("%s: of no use (%s); it is made anew", path, error)
            return None

    def _write(self, path: Path, tensors: dict[str, tuple[list[int], list[Tensor]]], about: dict[str, str]) -> None:
        try:
            write_whole(path, lambda file: _fill(file, tensors, about))
        except OSError as error:
            reason = f"cannot be written to ({error.strerror or error}): factors are made anew each time"
            self._warn_once(str(self.folder), f"{reason}; set REWIRE_CACHE to another folder")

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._said:
            self._said.add(about)
            log.warning("%s: %s", about, message)


def _fill(file: IO[bytes], tensors: dict[str, tuple[list[int], list[Tensor]]], about: dict[str, str]) -> None:
    """A safetensors file of tensors given as (shape, parts one behind another), so that none is copied whole."""
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, (shape, parts) in tensors.items():
        start, end = end, end + sum(part.nbytes for part in parts)
        dtype = {torch.float64: "F64", torch.float32: "F32"}[parts[0].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for _, parts in tensors.values():
        for part in parts:
            file.write(part.cpu().contiguous().numpy().data)


def _unpack(packed: Tensor, d: int) -> Tensor:
    """[d, d] by columns again: the same numbers in another order would give other last bits."""
    L = torch.zeros(d, d, dtype=packed.dtype).T
    strips = _strips(L)
    for strip, part in zip(strips, packed.split([strip.numel() for strip in strips]), strict=True):
        strip.copy_(part.view(strip.shape))
    return L


def _strips(L: Tensor) -> list[Tensor]:
    """The lower triangle of ``L: [d, d]`` by columns, as LAPACK leaves it: strips of `_STRIP` whole columns, each from
    its first diagonal element down."""
    return [L.T[columns, columns.start :] for columns in blocks(len(L), _STRIP)]


def _read_factor(content: Any, C: Tensor, wanted: str) -> Factor:
    d, about = len(C), content.metadata()
    size = sum((min(start + _STRIP, d) - start) * (d - start) for start in range(0, d, _STRIP))
    dtypes = ("F64",) if wanted == "float64" else ("F32", "F64")  # float64 where float32 broke down
    L = _unpack(_sized(content, "L", [size], dtypes)[:], d)
    scale = _sized(content, "scale", [d])[:].clone()[:, None]
    factor = Factor(L, scale, float(about["condition"]), float(about["ridge"]), about["why"])
    y = _probe(d)
    x = (factor.scale * y).to(C.device)
    asked = factor.scale * (product(C, x) + factor.ridge * x).cpu()
    found = (L @ (L.T @ y.to(L.dtype))).double()
    _agree(found - asked, asked.norm(), L.dtype)
    return factor


def _read_space(content: Any, C: Tensor, threshold: float) -> NullSpace:
    d = len(C)
    values, vectors = _sized(content, "values", [d])[:].clone(), _sized(content, "vectors", [d, d])
    trace = C.diagonal().double().sum().cpu()  # at least the largest eigenvalue
    _agree(values.sum() - trace, trace, values.dtype)
    space = Eigenbasis(values, vectors).null_space(threshold)
    side = values[space.rank :] if space.complement else values[: space.rank]
    z = _probe(len(side))
    v = space.basis @ z
    Cv = product(C, v.to(C.device)).cpu()
    _agree(v.norm() - z.norm(), z.norm(), values.dtype)
    _agree(Cv - space.basis @ (side[:, None] * z), trace * z.norm(), values.dtype)
    return space


def _sized(content: Any, key: str, shape: list[int], dtypes: Sequence[str] = ("F64",)) -> Any:
    """The tensor, unread. Raises ValueError for another shape or dtype, SafetensorError where there is none."""
    rows = content.get_slice(key)
    if rows.get_shape() != shape or rows.get_dtype() not in dtypes:
        found = f"{rows.get_shape()} {rows.get_dtype()}"
        raise ValueError(f"{key}: {found} found, expected {shape} {' or '.join(dtypes)}")
    return rows


def _probe(n: int) -> Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def _agree(difference: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where `difference` is more than rounding beside `size`, or not a number."""
    if not float(difference.norm()) <= _AGREE[dtype] * float(size) < torch.inf:
        raise ValueError("it does not fit the second moment")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
