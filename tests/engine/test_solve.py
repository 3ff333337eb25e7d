"""MEMIT's system as the editor asks for it: the same one in both forms, whatever rank C has."""

import pytest
import torch
from torch import Tensor

from rewire.bench.solve import correlated_keys, second_moment
from rewire.engine.solve import memit_update
from rewire.kernels.spd_solve import Factor, SolveError, reference, regular_factor

D = 120


def moment(dead: int) -> Tensor:
    C = second_moment(D, 4 * D)
    C[:dead] = C[:, :dead] = 0
    return C.float()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dead", [0, 3])
@pytest.mark.parametrize(("n", "form"), [(5, "woodbury"), (D // 4, "cholesky"), (D + 20, "cholesky")])
def test_a_ridge_is_part_of_c_in_either_form(dead: int, n: int, form: str) -> None:
    C, K, R = moment(dead), correlated_keys(n, D, 1), torch.randn(n, 7)
    factors, info = memit_update(K, R, C, 15.0)
    assert info.method == form
    assert info.ridge == (pytest.approx(1e-6 * float(C.diagonal().mean())) if dead else 0.0)
    ridged = C.double() + info.ridge * torch.eye(D, dtype=torch.float64)
    assert relative(factors.dense().double(), R.T.double() @ reference.memit(ridged, K, 15.0)) < 1e-5


def test_a_factor_that_cannot_be_had_leaves_the_dense_system() -> None:
    """C alone is indefinite, more than a ridge heals; with the keys added it is not."""
    K = correlated_keys(3, D, 1)
    C = torch.eye(D, dtype=torch.float64) - 0.1 * K.T @ K
    assert float(torch.linalg.eigvalsh(C)[0]) < -1e-3

    def none() -> Factor:
        return regular_factor(C)

    R = torch.randn(3, 7)
    with pytest.raises(SolveError):
        none()
    factors, info = memit_update(K, R, C, 2.0, none)
    assert (info.method, info.ridge) == ("cholesky", 0.0)
    assert relative(factors.dense().double(), R.T.double() @ reference.memit(C, K, 2.0)) < 1e-5
