"""The specification of a linear map with deltas: obvious torch, in whatever dtype it is given."""

from torch import Tensor


def add_delta(y: Tensor, x: Tensor, left: Tensor, right: Tensor, group: Tensor) -> Tensor:
    """Row i of ``y`` plus ``x[i] rightᵀ leftᵀ`` of delta ``group[i]``: nothing where that is negative. One dtype."""
    y = y.clone()
    for row, delta in enumerate(group.tolist()):
        if delta >= 0:
            y[row] += x[row] @ right[delta].T @ left[delta].T
    return y


def delta_linear(
    x: Tensor, weight: Tensor, left: Tensor, right: Tensor, group: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x weightᵀ + bias`` with the deltas added: ``x: [rows, T, d_in]`` or ``[rows, d_in]``, one dtype."""
    y = x @ weight.T
    return add_delta(y if bias is None else y + bias, x, left, right, group)
