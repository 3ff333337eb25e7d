"""Triton: Cholesky factor and solution of a batch of small systems, each whole in the registers of one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..variants import Variant

_COLUMNS = 32  # right-hand sides of one program


@triton.jit
def small_solve_kernel(  # type: ignore[no-untyped-def]
    a_ptr,  # [batch, n, n], contiguous; only the lower triangle matters
    b_ptr,  # [batch, n, k], contiguous
    l_ptr,  # [batch, n, n]: the factor, zeros above the diagonal
    x_ptr,  # [batch, n, k]
    status_ptr,  # [batch] int32
    n,
    k,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    system = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    square = i[:, None] * n + i[None, :]
    inside = (i[:, None] < n) & (i[None, :] < n)
    A = tl.load(a_ptr + system * n * n + square, mask=inside, other=0.0)
    right = system * n * k + i[:, None].to(tl.int64) * k + c[None, :]
    wanted = (i[:, None] < n) & (c[None, :] < k)
    X = tl.load(b_ptr + right, mask=wanted, other=0.0)

    # column by column: what is left of A below j loses the outer product of column j, and B its part of it
    L = tl.zeros((BLOCK, BLOCK), dtype=A.dtype)
    broke = tl.zeros((), dtype=tl.int32)
    for j in range(0, n):
        column = tl.sum(tl.where(i[None, :] == j, A, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == j, column, 0.0), axis=0)
        good = pivot > 0.0
        broke = tl.where((broke == 0) & (good == 0), j + 1, broke)
        pivot = tl.where(good, pivot, 1.0)
        column = tl.where(i >= j, column / tl.sqrt(pivot), 0.0)
        diagonal = tl.sum(tl.where(i == j, column, 0.0), axis=0)
        diagonal = tl.where(good, diagonal, 1.0)
        A = A - column[:, None] * column[None, :]
        L = tl.where(i[None, :] == j, column[:, None], L)
        y = tl.sum(tl.where(i[:, None] == j, X, 0.0), axis=0) / diagonal
        X = tl.where(i[:, None] == j, y[None, :], tl.where(i[:, None] > j, X - column[:, None] * y[None, :], X))
    for step in range(0, n):
        j = n - 1 - step
        row = tl.sum(tl.where(i[:, None] == j, L, 0.0), axis=0)
        diagonal = tl.sum(tl.where(i == j, row, 0.0), axis=0)
        diagonal = tl.where(diagonal > 0.0, diagonal, 1.0)
        x = tl.sum(tl.where(i[:, None] == j, X, 0.0), axis=0) / diagonal
        X = tl.where(i[:, None] == j, x[None, :], tl.where(i[:, None] < j, X - row[:, None] * x[None, :], X))

    tl.store(x_ptr + right, X, mask=wanted)
    if tl.program_id(1) == 0:
        tl.store(l_ptr + system * n * n + square, L, mask=inside)
        tl.store(status_ptr + system, broke)


def small_solve(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch on ``A: [b, n, n]`` and ``B: [b, n, k]`` of one dtype, contiguous, 1 <= n <= 32."""
    batch, n, k = B.shape
    L, X = torch.empty_like(A), torch.empty_like(B)
    status = torch.empty(batch, dtype=torch.int32, device=A.device)
    block = max(2, triton.next_power_of_2(n))
    if batch:
        with torch.cuda.device_of(A):  # no-op on the CPU
            small_solve_kernel[(batch, max(1, triton.cdiv(k, _COLUMNS)))](
                A, B, L, X, status, n, k, BLOCK=block, BLOCK_K=_COLUMNS, num_warps=_warps(block)
            )
    return L, X, status


def _warps(block: int) -> int:
    return 4 if block == 32 else 1


def variants() -> list[Variant]:
    """What gate B compiles: every size of block, in both precisions."""
    return [
        Variant(
            name=f"small_solve-{dtype}-n{block}",
            kernel=small_solve_kernel,
            types=dict.fromkeys(("a_ptr", "b_ptr", "l_ptr", "x_ptr"), f"*{dtype}") | {"status_ptr": "*i32"},
            constants={"BLOCK": block, "BLOCK_K": _COLUMNS},
            aligned=("a_ptr", "b_ptr", "l_ptr", "x_ptr", "status_ptr"),
            num_warps=_warps(block),
            default=dtype == "fp64",
        )
        for dtype in ("fp32", "fp64")
        for block in (2, 4, 8, 16, 32)
    ]
