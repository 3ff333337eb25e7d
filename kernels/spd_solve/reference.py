"""The specification of the solve: obvious torch, in float64."""

import torch


def solve(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """``A⁻¹ B`` by LU in float64: ``A: [n, n]``, ``B: [n, k]``."""
    return torch.linalg.solve(A.double(), B.double())
