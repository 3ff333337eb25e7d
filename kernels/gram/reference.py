"""The specification of the second moment: obvious torch, in whatever dtype it is given."""

import torch


def gram(C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """``C + Xᵀ diag(weight) X``, whole and symmetric: ``C: [d, d]``, ``X: [T, d]``, ``weight: [T]``, one dtype."""
    return C + X.T @ (X if weight is None else X * weight[:, None])
