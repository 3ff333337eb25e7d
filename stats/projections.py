"""Null-space projections as others publish them (AlphaEdit and its line), checked, and as a basis."""

import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..kernels.spd_solve import NullSpace

TOLERANCE = 1e-4  # of |x|: a projection in float32 stays two orders below, one that was rounded to 16 bits above
_PROBES = 8
_ROWS = 1024  # rows of P in float64 at a time


@dataclass(frozen=True)
class Projections:
    """Projections onto the null spaces of C, a layer at a time: `projections[layer]` reads and checks it.

    path: one file with a tensor [layers, d, d], or a folder of files [d, d] called layer-{layer}.pt
    layers: in the order of the file
    """

    path: Path
    layers: tuple[int, ...]
    width: int

    def __getitem__(self, layer: int) -> Tensor:
        """P: [d, d] float32; mapped from the file where it is float32 there. Raises `InputError` for no projection."""
        if layer not in self.layers:
            raise InputError(f"{self.path}: holds layers {_listed(self.layers)}, layer {layer} was asked for")
        if self.path.is_dir():
            path = self.path / f"layer-{layer}.pt"
            return checked(_square(path, self.width), str(path))
        stack = _stack(self.path, self.layers, self.width)
        return checked(stack[self.layers.index(layer)], f"{self.path}, layer {layer}")


def read_projections(path: str | Path, layers: Sequence[int], width: int) -> Projections:
    """What is at `path`, with shapes checked; each projection is checked when it is taken out.

    path: a .pt file of one tensor [layers, d, d] (or [d, d] for one layer), or a folder of layer-{layer}.pt, [d, d]
    layers: which they are, in the order of the file: such a file does not say
    width: d_in of these layers
    Raises `InputError` for another number of layers, another width, or a file that holds something else.
    """
    path = Path(path)
    if path.is_dir():
        for layer in layers:
            _square(path / f"layer-{layer}.pt", width)
    else:
        _stack(path, layers, width)
    return Projections(path, tuple(layers), width)


@torch.no_grad()
def checked(P: Tensor, where: str) -> Tensor:
    """P: [d, d], as float32, if it is an orthogonal projection: symmetric and idempotent on random vectors.

    Raises `InputError` where it is not, or projects onto nothing or everything.
    """
    P = P.float()
    X = torch.randn(len(P), _PROBES, generator=torch.Generator().manual_seed(0))
    once = P @ X
    for what, found in (("idempotent", P @ once), ("symmetric", P.T @ X)):
        # NaN compares as false
        off = float((found - once).norm() / X.norm())
        if not off <= TOLERANCE:
            raise InputError(
                f"{where}: no projection: not {what}, off by {off:.1e} of a random vector (at most {TOLERANCE:.0e}); "
                "expected P = U Uᵀ over eigenvectors U of C"
            )
    rank = _rank(P)
    if not 0 < rank < len(P):
        raise InputError(f"{where}: of rank {rank} in {len(P)}; expected a projection onto a part of the space")
    return P


@torch.no_grad()
def basis_of(P: Tensor) -> NullSpace:
    """The same projection as an orthonormal basis of its image or of the complement, whichever is smaller.

    P: [d, d] float32, a projection (`checked`)
    Returns a `NullSpace`; its `below` and `above` are NaN: a projection does not tell eigenvalues.
    Memory: some [d, r] float64 beside P, r at most d / 2.
    """
    d, rank = len(P), _rank(P)
    complement = 2 * rank > d
    size = d - rank if complement else rank
    basis = torch.randn(d, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # P's other eigenvalues are some 1e-7: a second product takes out what the first left of them
    for _ in range(2):
        image = torch.cat([rows.double() @ basis for rows in P.split(_ROWS)])
        basis = torch.linalg.qr(basis - image if complement else image)[0]
    return NullSpace(basis.contiguous(), complement, rank, torch.nan, torch.nan)


def _rank(P: Tensor) -> int:
    return round(float(P.diagonal().double().sum()))


def _stack(path: Path, layers: Sequence[int], width: int) -> Tensor:
    """[layers, d, d], mapped from the file."""
    tensor = _load(path)
    if tensor.ndim == 2 and len(layers) == 1:
        tensor = tensor[None]
    found = list(tensor.shape)
    if tensor.ndim != 3 or found[1] != found[2]:
        raise InputError(f"{path}: a tensor {found} found, expected projections [{len(layers)}, {width}, {width}]")
    if found[1] != width:
        raise InputError(f"{path}: projections of width {found[1]} found, the model's layers have {width}")
    if found[0] != len(layers):
        raise InputError(
            f"{path}: {found[0]} projections found, expected {len(layers)}, of layers {_listed(layers)}; name the "
            "layers that they were made for"
        )
    return tensor


def _square(path: Path, width: int) -> Tensor:
    tensor = _load(path)
    if list(tensor.shape) != [width, width]:
        raise InputError(f"{path}: a tensor {list(tensor.shape)} found, expected a projection [{width}, {width}]")
    return tensor


def _load(path: Path) -> Tensor:
    """The one tensor in a .pt file, mapped; nothing in the file is run."""
    try:
        if not zipfile.is_zipfile(path):  # False, too, where nothing can be read
            what = "truncated or broken" if path.is_file() else "no such file"
            raise InputError(f"{path}: {what}; expected a null-space projection, as torch.save writes it")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}: holds Python objects, which are not run; expected one tensor in float32") from None
    except (OSError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: truncated or broken, no tensor in it ({reason}); fetch it anew") from None
    if not isinstance(content, Tensor) or content.dtype not in (torch.float32, torch.float64):
        what = str(content.dtype if isinstance(content, Tensor) else type(content).__name__)
        raise InputError(f"{path}: {what} found, expected one tensor in float32: null-space projections")
    return content


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
