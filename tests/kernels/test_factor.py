"""The factor of a second moment: as it is where it has full rank, with a ridge that is said where it has not."""

import re

import pytest
import torch

from rewire.bench.solve import correlated_keys, second_moment
from rewire.kernels.errors import InputError
from rewire.kernels.spd_solve import SolveError, factorize, reference, regular_factor, woodbury

D = 300


@pytest.fixture(scope="module")
def C():
    return second_moment(D, 4 * D)


def keys(n=40, seed=0):
    return correlated_keys(n, D, seed)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_a_full_rank_has_no_ridge(C):
    for stored in (C, C.float()):
        found, plain = regular_factor(stored), factorize(stored)
        assert torch.equal(found.L, plain.L)
        assert torch.equal(found.scale, plain.scale)
        assert (found.condition, found.ridge, found.why) == (plain.condition, 0.0, "")


def deficient(how, C):
    """C without full rank, and what is said of it."""
    if how == "thin":
        K = keys(D // 2, seed=3)
        return K.T @ K / len(K), r"Cholesky broke down at row 15\d of 300|the condition is at least 1e1[3-9]"
    C = C.clone()
    if how == "dead":
        C[[5, 17]] = 0
        C[:, [5, 17]] = 0
        return C, "2 of 300 diagonal elements are not positive, the first in row 5"
    C[7] = C[6]
    C[:, 7] = C[:, 6]  # two units that always fire alike
    return C, "the condition is at least|Cholesky broke down at row 8 of 300"


@pytest.mark.parametrize("how", ["thin", "dead", "twin"])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
@pytest.mark.parametrize("weight", [1.0, 15000.0])
def test_a_deficient_rank_gets_a_ridge(C, how, stored, weight):
    A, why = deficient(how, C)
    A, K = A.to(stored), keys()
    factor = regular_factor(A)
    assert factor.ridge == pytest.approx(1e-6 * float(A.diagonal().double().mean()))
    assert re.search(why, factor.why)
    Xt, info = woodbury(factor, A, K, weight, full=True)
    ridged = A.double() + factor.ridge * torch.eye(D, dtype=torch.float64)
    system = weight * ridged + K.T @ K
    assert info.ridge == factor.ridge
    assert relative(system @ Xt.T, K.T) < 1e-8
    bound = 10 * float(torch.linalg.cond(system)) * torch.finfo(torch.float64).eps
    assert relative(Xt, reference.memit(ridged, K, weight)) < bound
    dense = factor.L @ factor.L.T / (factor.scale * factor.scale.T)
    assert relative(dense, ridged) < 1e-12


def test_what_a_ridge_cannot_help_is_refused(C):
    for hopeless in (torch.zeros(D, D), C - 0.1 * torch.eye(D)):
        with pytest.raises(SolveError, match="not positive definite"):
            regular_factor(hopeless)
    with pytest.raises(InputError, match="A holds NaN"):
        regular_factor(C.masked_fill(torch.eye(D, dtype=torch.bool), torch.nan))
