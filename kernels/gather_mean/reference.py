"""The specification of the gather and its scatter twin: obvious torch, in whatever dtype it is given."""

import torch
from torch import Tensor


def gather_mean(K: Tensor, X: Tensor, position: Tensor, group: Tensor, weight: Tensor | None = None) -> Tensor:
    """K with ``weight[r] X[r, position[r]]`` added to its row ``group[r]``, for each row r of X."""
    found = X[torch.arange(len(X), device=X.device), position]
    return K.index_add(0, group, found if weight is None else found * weight[:, None])


def scatter_add(H: Tensor, position: Tensor, group: Tensor, delta: Tensor) -> Tensor:
    """H with ``delta[group[r]]`` added at token ``position[r]`` of each row r."""
    there = torch.arange(H.shape[1], device=H.device) == position[:, None]
    return torch.where(there[:, :, None], H + delta[group][:, None], H)
