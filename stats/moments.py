"""The uncentred second moment of one layer's keys: its running sum, and what comes out of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.errors import InputError
from ..kernels.gram import gram_, mirror_

FOLD = 16384  # tokens that fp32 sums up before fp64 takes over


@dataclass(frozen=True, eq=False)
class Moment:
    """Σ k kᵀ over the tokens of a corpus, un-normalised as the ecosystem stores it.

    sum: [d, d] float32 on the CPU, symmetric
    count: tokens that went in
    documents: documents that they came from, None where a file does not say
    source: the file that it was read from, or "collected"
    """

    sum: Tensor
    count: int
    documents: int | None = None
    source: str = "collected"

    @property
    def mean(self) -> Tensor:
        """C = sum / count, [d, d] float32; a new tensor at every call."""
        return self.sum / self.count


class SecondMoment:
    """Adds up k kᵀ: float32 within `FOLD` tokens, float64 across them; lower triangles, mirrored at the end.

    d: width of the keys
    device: where they come from: holds 4 d² bytes there, and 8 d² on the CPU
    name: the layer, for errors
    """

    def __init__(self, d: int, device: torch.device | str = "cpu", name: str = "keys") -> None:
        self.name = name
        self.count = 0
        self._in_chunk = 0
        with torch.inference_mode(False):  # made inside somebody's inference mode, written to outside it
            self._chunk = torch.zeros(d, d, dtype=torch.float32, device=device)
            self._sum = torch.zeros(d, d, dtype=torch.float64)

    @torch.no_grad()
    def add(self, X: Tensor) -> None:
        """X: [T, d] any float dtype, one key a row, no padding. NaN or Inf raise `InputError` at the next fold."""
        if X.ndim != 2 or X.shape[1] != len(self._sum):
            raise ValueError(f"{self.name}: keys of shape {tuple(X.shape)}, expected [T, {len(self._sum)}]")
        while len(X):
            part, X = X[: FOLD - self._in_chunk], X[FOLD - self._in_chunk :]
            gram_(self._chunk, part.float() if part.dtype is torch.float64 else part)
            self._in_chunk += len(part)
            self.count += len(part)
            if self._in_chunk == FOLD:
                self._fold()

    @torch.no_grad()
    def finish(self, documents: int | None = None) -> Moment:
        """What came together so far. Raises `InputError` for NaN or Inf."""
        self._fold()
        total = self._sum.float()
        mirror_(total)
        return Moment(total, self.count, documents)

    def _fold(self) -> None:
        # a sum of squares is finite exactly where its column was: d values to look at instead of T d
        if not torch.isfinite(self._chunk.diagonal()).all():
            raise InputError(
                f"{self.name}: NaN or Inf among the keys of tokens {self.count - self._in_chunk} to {self.count}; "
                "expected finite values: check the model's weights, or load it in bfloat16 or float32"
            )
        self._sum += self._chunk.cpu()
        self._chunk.zero_()
        self._in_chunk = 0
