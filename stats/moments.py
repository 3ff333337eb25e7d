"""The uncentred second moment of one layer's keys: its running sum, and what comes out of it."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..kernels.gram import gram_, mirror_
from .memory import choose_place as choose_place  # whoever plans asks here

FOLD = 16384  # tokens that fp32 sums up before fp64 takes over
STRIP = 256  # rows of the lower triangle that are handled at a time
_SAMPLES = 4096  # values of a triangle that its digest looks at, beside the diagonal


@dataclass(frozen=True, eq=False)
class Moment:
    """Σ k kᵀ over the tokens of a corpus, un-normalised as the ecosystem stores it.

    triangle: [d (d + 1) / 2] float64 on the CPU: the lower triangle, row after row
    count: tokens that went in
    documents: documents that they came from, None where a file does not say
    source: the file that it is in, or "collected" where it is in none
    seconds: that collecting it took, interruptions left out; 0 where it was read from a file
    """

    triangle: Tensor
    count: int
    documents: int | None = None
    source: str = "collected"
    seconds: float = 0.0

    @classmethod
    def of(cls, total: Tensor, count: int, documents: int | None = None, source: str = "collected") -> "Moment":
        """From the sum as a matrix [d, d] of any floating dtype, of which the lower triangle is read."""
        return cls(pack(total), count, documents, source)

    @property
    def width(self) -> int:
        return width_of(len(self.triangle))

    @property
    def sum(self) -> Tensor:
        """[d, d] float64, symmetric; a new tensor at every access."""
        return unpack(self.triangle)

    @property
    def mean(self) -> Tensor:
        """C = sum / count, [d, d] float32; a new tensor at every access."""
        return unpack(self.triangle, 1 / self.count, torch.float32)

    @property
    def diagonal(self) -> Tensor:
        """[d] float64, of the sum."""
        at = torch.arange(self.width)
        return self.triangle[at * (at + 3) // 2]

    @property
    def digest(self) -> str:
        """16 hex digits over the tokens, the diagonal and a sample of the rest: what is derived from it is kept by."""
        sample = self.triangle[:: max(1, len(self.triangle) // _SAMPLES)]
        parts = hashlib.sha256(f"{self.width} {self.count}".encode())
        for values in (self.diagonal, sample):
            parts.update(values.contiguous().numpy().tobytes())
        return parts.hexdigest()[:16]


def width_of(length: int) -> int:
    """The d whose triangle has `length` values. Raises `InputError` where there is none."""
    d = round(((8 * length + 1) ** 0.5 - 1) / 2)
    if d * (d + 1) // 2 != length or length == 0:
        raise InputError(f"{length} values are no lower triangle; expected d (d + 1) / 2 of them")
    return d


def strips(d: int) -> Iterator[tuple[slice, int]]:
    """(rows, columns that their part of the lower triangle needs), `STRIP` rows at a time."""
    for start in range(0, d, STRIP):
        end = min(start + STRIP, d)
        yield slice(start, end), end


def pack(full: Tensor) -> Tensor:
    """The lower triangle of ``full: [d, d]``, row after row: [d (d + 1) / 2] float64 on the CPU."""
    d = len(full)
    triangle = torch.empty(d * (d + 1) // 2, dtype=torch.float64)
    for rows, end in strips(d):
        _take_rows(triangle, rows, full[rows, :end].cpu())
    return triangle


def _take_rows(triangle: Tensor, rows: slice, strip: Tensor) -> None:
    """Writes a strip's rows into the triangle, each up to its diagonal element."""
    for row in range(rows.start, rows.stop):
        start = row * (row + 1) // 2
        triangle[start : start + row + 1] = strip[row - rows.start, : row + 1]


def unpack(triangle: Tensor, factor: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The symmetric [d, d] of which ``triangle`` is the lower part, times a factor, as `dtype`."""
    d = width_of(len(triangle))
    full = torch.empty(d, d, dtype=dtype)
    for row in range(d):
        start = row * (row + 1) // 2
        full[row, : row + 1] = triangle[start : start + row + 1] * factor
    mirror_(full)
    return full


class SecondMoment:
    """Adds up k kᵀ: float32 within a chunk of at most `FOLD` tokens, float64 across chunks; lower triangles only.

    d: width of the keys
    device: where they come from; holds the chunk, 4 d² bytes
    name: the layer, for errors
    place: of the float64 sums, some 4 d² bytes: "device", "cpu", or "disk": a file mapped into memory
    chunk: [d, d] float32 on the device, all zero, that several layers share: each is then folded as soon as it is added
    spill: for "disk", the folder of that file, which has no name in it and so goes with the process, however that dies

    sums: [n] float64, the lower triangle in strips of `STRIP` rows, each as wide as its last row
    """

    def __init__(
        self,
        d: int,
        device: torch.device | str = "cpu",
        name: str = "keys",
        place: str = "device",
        chunk: Tensor | None = None,
        spill: Path | None = None,
    ) -> None:
        self.name, self.d = name, d
        self.count = 0
        self._in_chunk = 0
        self._shared = chunk is not None
        shapes = [(rows.stop - rows.start, end) for rows, end in strips(d)]
        size = sum(height * width for height, width in shapes)
        with torch.inference_mode(False):  # made inside somebody's inference mode, written to outside it
            self.chunk = torch.zeros(d, d, dtype=torch.float32, device=device) if chunk is None else chunk
            if place == "disk":
                self.sums = _mapped(spill, size, name)
            else:
                self.sums = torch.zeros(size, dtype=torch.float64, device="cpu" if place == "cpu" else device)
            parts = self.sums.split([height * width for height, width in shapes])
            self._strips = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def add(self, X: Tensor) -> None:
        """X: [T, d] any float dtype, one key a row, no padding. NaN or Inf raise `InputError` at the next fold."""
        if X.ndim != 2 or X.shape[1] != self.d:
            raise ValueError(f"{self.name}: keys of shape {tuple(X.shape)}, expected [T, {self.d}]")
        while len(X):
            part, X = X[: FOLD - self._in_chunk], X[FOLD - self._in_chunk :]
            gram_(self.chunk, part.float() if part.dtype is torch.float64 else part)
            self._in_chunk += len(part)
            self.count += len(part)
            if self._in_chunk == FOLD or self._shared:
                self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the chunk to the sums and clears it."""
        if not self._in_chunk:
            return
        # a sum of squares is finite exactly where its column was: d values to look at instead of T d
        if not torch.isfinite(self.chunk.diagonal()).all():
            raise InputError(
                f"{self.name}: NaN or Inf among the keys of tokens {self.count - self._in_chunk} to {self.count}; "
                "expected finite values: check the model's weights, or load it in bfloat16 or float32"
            )
        for strip, (rows, end) in zip(self._strips, strips(self.d), strict=True):
            strip += self.chunk[rows, :end].to(strip.device)
        self.chunk.zero_()
        self._in_chunk = 0

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """[d] float64 on the CPU, of the folded sums."""
        strips_ = zip(self._strips, strips(self.d), strict=True)
        return torch.cat([strip.diagonal(rows.start).cpu() for strip, (rows, _) in strips_])

    @torch.no_grad()
    def finish(self, documents: int | None = None) -> Moment:
        """What came together so far. Raises `InputError` for NaN or Inf."""
        self.fold()
        return Moment(to_triangle(self.sums, self.d), self.count, documents)


def _mapped(folder: Path | None, size: int, name: str) -> Tensor:
    """[size] float64, zeros, in a file of which only the map is left. Raises `InputError` where there is no room."""
    try:
        with tempfile.NamedTemporaryFile(prefix="sums-", dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk kills the process when it is written to
                os.posix_fallocate(file.fileno(), 0, 8 * size)
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.float64)
    except OSError as error:
        raise InputError(
            f"{folder or tempfile.gettempdir()}: no room for the running sums of {name}, {8 * size / 1e9:.1f} GB "
            f"({error.strerror}); free some space, or name another folder"
        ) from None


def to_triangle(sums: Tensor, d: int) -> Tensor:
    """The strips of a `SecondMoment` as a packed triangle, on the CPU. What they hold above the diagonal is dropped."""
    triangle, done = sums.new_empty(d * (d + 1) // 2), 0
    for rows, end in strips(d):
        size = (rows.stop - rows.start) * end
        _take_rows(triangle, rows, sums[done : done + size].view(-1, end))
        done += size
    return triangle.cpu()
