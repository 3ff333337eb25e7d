"""What residuals of systems with a second moment C are measured with."""

import torch
from torch import Tensor

from .factor import blocks
from .info import SAMPLES

STEPS = 3  # of refinement; an accurate factor needs none
_ROWS = 128  # of C in fp64 at a time: they stay in the caches


def symmetric_product(C: Tensor, X: Tensor) -> Tensor:
    """C X in fp64 for a symmetric C, as (Xᵀ C)ᵀ: C is read once, row by row, and never copied whole."""
    if C.dtype is torch.float64:
        return (X.mT @ C.mT).mT  # read as its transpose: BLAS then takes dot products of rows
    out = X.new_zeros(*X.shape[:-2], X.shape[-1], C.shape[-1])
    for rows in blocks(C.shape[-1], _ROWS):
        out += X[..., rows, :].mT @ C[..., rows, :].double()
    return out.mT


def combinations(K: Tensor) -> Tensor:
    """[n, 8] fp64 on K's device: which columns of the solution are looked at together; the same at every call."""
    generator = torch.Generator().manual_seed(K.shape[-2])
    return torch.randn(K.shape[-2], SAMPLES, generator=generator, dtype=torch.float64).to(K.device)
