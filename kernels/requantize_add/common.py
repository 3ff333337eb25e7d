"""What writing into dense and into quantised weights shares."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import InputError
from .reference import share_lost

_ELEMENTS = 1 << 24  # of a row block: 64 MiB in fp32


def check_factors(
    operation: str, shape: Sequence[int], left: Tensor, right: Tensor | None, device: torch.device
) -> None:
    """Raises InputError unless left @ right, or left alone, is an fp32 update of `shape`, on `device`."""
    d_out, d_in = shape
    rank = "r" if left.ndim != 2 else left.shape[1]
    expected = f"[{d_out}, {d_in}]" if right is None else f"[{d_out}, {rank}] and [{rank}, {d_in}]"
    fits = left.ndim == 2 and left.shape == ((d_out, d_in) if right is None else (d_out, rank))
    if right is not None:
        fits = fits and right.shape == (rank, d_in)
    factors = [left] if right is None else [left, right]
    if not fits or any(each.dtype is not torch.float32 or each.device != device for each in factors):
        names = "left is" if right is None else "left and right are"
        found = " and ".join(f"{name(each)} on {each.device}" for each in factors)
        raise InputError(f"{operation}: {names} {found}; expected {expected} float32 on {device}")


def name(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def row_blocks(shape: Sequence[int], multiple: int = 1) -> Iterator[slice]:
    """Slices of rows that bound a temporary copy; each but the last of a multiple of `multiple` rows."""
    rows, cols = shape
    step = -(-max(_ELEMENTS // cols, 64) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, start + step)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products inside are fp32 products, whatever the caller prefers: what is written is what was solved."""
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(asked)


def square(values: Tensor) -> Tensor:
    """The squared norm of a matrix: fp32 along a row, fp64 over the rows (one fp32 sum over 10^7 loses four digits)."""
    return torch.linalg.vector_norm(values, dim=1).double().square().sum()


def share(sums: Tensor) -> float:
    """[parts, 2] squares of what was missed and of what was asked -> the share lost."""
    missed, asked = sums.double().sum(0).sqrt().tolist()
    return share_lost(missed, asked)
