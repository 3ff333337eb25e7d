"""The specification of the second moment: obvious torch, in whatever dtype it is given."""

import torch


def gram(C: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """``C + XᵀX``, whole and symmetric: ``C: [d, d]``, ``X: [T, d]``, one dtype for both (float64 as an oracle)."""
    return C + X.T @ X
