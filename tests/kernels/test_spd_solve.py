"""spd_solve: right where it answers, and it does not answer where it cannot be right."""

import json
from dataclasses import asdict

import pytest
import torch

from rewire.kernels.errors import InputError
from rewire.kernels.spd_solve import SolveError, reference, spd_solve

N = 200


def spd(condition: float, n: int = N, seed: int = 0) -> torch.Tensor:
    """[n, n] fp64, symmetric, eigenvalues spread evenly in log from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    A = Q * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64) @ Q.T
    return (A + A.T) / 2


def rhs(k: int = 7, n: int = N) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def residual(A: torch.Tensor, B: torch.Tensor, X: torch.Tensor) -> float:
    return float(torch.linalg.norm(A.double() @ X - B.double()) / torch.linalg.norm(B.double()))


def relative(X: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(X - exact) / torch.linalg.norm(exact))


@pytest.mark.parametrize("n", [1, 2, 200, 513, 1100])  # blocks are of 512 rows
@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_agrees_with_lu(n, stored):
    A, B = spd(1e3, n).to(stored), rhs(3, n).to(stored)
    before = A.clone()
    X, info = spd_solve(A, B)
    assert X.dtype is torch.float64
    assert relative(X, reference.solve(A, B)) < 1e-11
    assert info.residual == pytest.approx(residual(A, B, X), rel=0.5)
    assert info.residual < 1e-12
    assert info.dtype == "float64"
    assert torch.equal(A, before)


def test_right_hand_sides_of_any_dtype_and_number():
    A = spd(10)
    assert spd_solve(A, rhs(1).bfloat16())[1].residual < 1e-13
    assert spd_solve(A, rhs(0))[0].shape == (N, 0)
    X, info = spd_solve(A, torch.zeros(N, 2))
    assert not X.any()
    assert info.residual == 0


def test_bad_scales_are_scaled_away():
    scale = torch.logspace(0, 6, N, dtype=torch.float64)
    A = scale[:, None] * spd(1e2) * scale
    assert torch.linalg.cond(A) > 1e12
    for dtype in (torch.float64, torch.float32):
        X, info = spd_solve(A, rhs(), dtype)
        assert info.dtype == str(dtype).removeprefix("torch.")
        assert info.residual < 1e-6
        assert 1 <= info.condition < 1e3
        assert relative(X * scale[:, None], reference.solve(A, rhs()) * scale[:, None]) < 1e-4


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
def test_condition_is_a_lower_bound(condition):
    A = spd(condition)
    scale = A.diagonal().rsqrt()
    exact = float(torch.linalg.cond(scale[:, None] * A * scale))
    assert 1 <= spd_solve(A, rhs())[1].condition <= exact


def test_float32_is_refined():
    A = spd(1e4)
    X, info = spd_solve(A, rhs(), torch.float32)
    assert info.dtype == "float32"
    assert info.refinements > 0
    assert residual(A, rhs(), X) <= 1e-6


@pytest.mark.parametrize("condition", [1e9, 1e11])  # refinement does not converge; Cholesky in float32 breaks down
def test_float32_that_fails_is_done_in_float64(condition):
    A = spd(condition)
    B = A @ rhs()  # in the range: float64 can
    X, info = spd_solve(A, B, torch.float32)
    assert info.dtype == "float64"
    assert residual(A, B, X) <= 1e-6


def test_float64_is_refined_where_the_first_solve_misses():
    # Cholesky reads one triangle; the other differs a little, and the residual is that of the whole A
    A = spd(10)
    A += 1e-4 * A.diagonal().min() * rhs(N).triu(1)
    X, info = spd_solve(A, rhs())
    assert info.refinements > 0
    assert info.residual <= 1e-6
    assert relative(X, reference.solve(A, rhs())) < 1e-5


def test_missed_tolerance_speaks():
    with pytest.raises(
        SolveError, match=r"relative residual .* in float64, above 1e-06.* at least .*tokens.*lambda"
    ) as caught:
        spd_solve(spd(1e14), rhs())
    assert caught.value.residual > 1e-6
    assert 1e9 < caught.value.condition < 1e15
    assert isinstance(caught.value, InputError)


def test_singular_is_refused_with_an_estimate():
    K = rhs(50)
    with pytest.raises(
        SolveError, match=r"not positive definite \(Cholesky broke down at row 5\d of 200\).*at least [1-9].*tokens"
    ) as caught:
        spd_solve(K @ K.T, rhs())
    assert caught.value.condition > 1e12


def test_indefinite_is_refused():
    A = spd(10)
    A -= 0.5 * torch.eye(N, dtype=torch.float64) * A.diagonal().min()
    with pytest.raises(SolveError, match="not positive definite"):
        spd_solve(A, rhs())


def test_dead_unit_is_named():
    A = spd(10)
    A[17] = A[:, 17] = 0
    with pytest.raises(SolveError, match="1 of 200 diagonal elements are not positive, the first in row 17"):
        spd_solve(A, rhs())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["A", "B"])
def test_what_is_not_finite_is_named(which, value):
    A, B = spd(10), rhs()
    {"A": A, "B": B}[which][N - 1, 3] = value
    with pytest.raises(InputError, match=f"{which} holds NaN or infinity"):
        spd_solve(A, B)


@pytest.mark.parametrize("filled", [torch.tril, torch.triu])
def test_one_triangle_is_no_matrix(filled):
    with pytest.raises(InputError, match="not symmetric"):
        spd_solve(filled(spd(1e3)), rhs())


@pytest.mark.parametrize(
    ("A", "B", "dtype", "says"),
    [
        (torch.eye(3)[:2], torch.ones(3, 1), torch.float64, r"A is \[2, 3\]"),
        (torch.eye(3).half(), torch.ones(3, 1), torch.float64, "A is .* torch.float16"),
        (torch.eye(0), torch.ones(0, 1), torch.float64, r"A is \[0, 0\]"),
        (torch.eye(3), torch.ones(3), torch.float64, r"B is \[3\]"),
        (torch.eye(3), torch.ones(4, 1), torch.float64, r"B is \[4, 1\].*expected \[3, k\]"),
        (torch.eye(3), torch.ones(3, 1, dtype=torch.int64), torch.float64, "B is .*int64"),
        (torch.eye(3), torch.ones(3, 1), torch.bfloat16, "dtype=torch.bfloat16"),
    ],
)
def test_wrong_input_is_named(A, B, dtype, says):
    with pytest.raises(InputError, match=says):
        spd_solve(A, B, dtype)


def test_info_goes_into_a_report():
    assert json.loads(json.dumps(asdict(spd_solve(spd(10), rhs())[1])))["dtype"] == "float64"


def test_memory_is_two_squares_and_blocks():
    """No [n, n] tensor but the scaled matrix and its factor (each counted once, by storage)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, squares = 1200, set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 8 * n * n:
                    squares.add(tensor.untyped_storage().data_ptr())
            return out

    A, B = spd(10, n).float(), rhs(2, n)
    with Watch():
        spd_solve(A, B)
    assert len(squares) == 2
