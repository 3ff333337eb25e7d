"""small_solve: Cholesky factor and solution of a batch of systems of up to 32 unknowns."""

import torch

from ...kernels.floors import Cost, small_solve_cost
from ...kernels.spd_solve import small_solve
from ..check import Inputs, Outputs, Shape, Subject


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> Inputs:
    b, n, k = shape["batch"], shape["n"], shape["k"]
    half = torch.randn(b, n, n + 3, generator=seed, dtype=torch.float64)
    A = half @ half.mT
    scale = A.diagonal(dim1=-2, dim2=-1).rsqrt()[..., None]
    B = torch.randn(b, n, k, generator=seed, dtype=torch.float64)
    return (scale * A * scale.mT).to(device, dtype), B.to(device, dtype)


def run(inputs: Inputs, impl: str) -> Outputs:
    L, X, status = small_solve(*inputs, impl=impl)
    return L, X, status.double()


def solved(A: torch.Tensor, B: torch.Tensor) -> Outputs:
    L = torch.linalg.cholesky(A)
    return L, torch.cholesky_solve(B, L), torch.zeros(len(A), dtype=torch.float64, device=A.device)


def exact(inputs: Inputs) -> Outputs:
    A, B = inputs
    return solved(A.double(), B.double())


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    return small_solve_cost(shape["batch"], shape["n"], shape["k"], dtype.itemsize)


SUBJECTS = (
    Subject(
        operation=small_solve,
        make=make,
        run=run,
        exact=exact,
        plain=lambda inputs: solved(*inputs),
        cost=cost,
        odd=(
            {"batch": 5, "n": 7, "k": 3},
            {"batch": 3, "n": 32, "k": 40},
            {"batch": 1, "n": 1, "k": 1},
            {"batch": 0, "n": 4, "k": 2},
            {"batch": 2, "n": 17, "k": 0},
            {"batch": 4, "n": 2, "k": 300},
        ),
        small=({"batch": 64, "n": 32, "k": 8}, {"batch": 1024, "n": 8, "k": 8}),
        large=({"batch": 4096, "n": 32, "k": 32}, {"batch": 4096, "n": 16, "k": 16}, {"batch": 4096, "n": 8, "k": 8}),
        library={"linalg.solve": lambda inputs: (torch.linalg.solve(*inputs),)},
        dtypes=(torch.float32, torch.float64),
    ),
)
