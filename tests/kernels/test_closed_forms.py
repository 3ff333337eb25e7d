"""Solves in the number of keys: equal to the published procedures' dense systems, and refused where they are not."""

import pytest
import torch

from rewire.bench.check import check, inputs_of
from rewire.bench.operations.small_solve import SUBJECTS
from rewire.bench.solve import correlated_keys, second_moment
from rewire.kernels.dispatch import interpreting, recording
from rewire.kernels.errors import InputError
from rewire.kernels.spd_solve import (
    Factor,
    KeySystem,
    SolveError,
    eigenbasis,
    factorize,
    null_space,
    push_through,
    reference,
    rls_step_,
    spd_solve,
    woodbury,
)

D, N = 300, 40


@pytest.fixture(scope="module")
def C():
    """[300, 300] fp64, condition above 1e8, its eigenvalues on both sides of 2e-2."""
    return second_moment(D, 4 * D)


def keys(n=N, seed=0):
    return correlated_keys(n, D, seed)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_the_moment_is_as_hard_as_it_says(C):
    assert torch.linalg.cond(C) > 1e8


@pytest.mark.parametrize("weight", [1e-2, 1.0, 15000.0])
@pytest.mark.parametrize("n", [1, 2, 40, 75])
def test_woodbury_is_the_published_system(C, weight, n):
    K = keys(n)
    Xt, info = woodbury(factorize(C), C, K, weight)
    assert relative((weight * C + K.T @ K) @ Xt.T, K.T) < 1e-8
    assert info.residual < 1e-8
    assert (info.method, info.checked, info.dtype) == ("woodbury", "sampled", "float64")
    A = weight * C + K.T @ K
    bound = 10 * float(torch.linalg.cond(A)) * torch.finfo(torch.float64).eps  # what LU itself is good for
    assert relative(Xt, reference.memit(C, K, weight)) < bound
    assert relative(Xt, spd_solve(A, K.T)[0].T) < bound


def test_woodbury_full_measures_every_column(C):
    K = keys()
    Xt, info = woodbury(factorize(C), C, K, 2.0, full=True)
    assert info.checked == "full"
    measured = relative((2 * C + K.T @ K) @ Xt.T, K.T)
    assert info.residual == pytest.approx(measured, rel=0.5)


def test_woodbury_over_a_grid_of_lambdas(C):
    K, weights = keys(), [0.1, 1.0, 200.0]
    factor = factorize(C)
    grid, info = woodbury(factor, C, K, torch.tensor(weights, dtype=torch.float64))
    assert grid.shape == (3, N, D)
    for Xt, weight in zip(grid, weights, strict=True):
        assert relative(Xt, woodbury(factor, C, K, weight)[0]) < 1e-9
    assert info.residual < 1e-8


def test_woodbury_over_all_layers_at_once(C):
    layers = torch.stack([C, C + 1e-3 * torch.eye(D), 3 * C])
    K = torch.stack([keys(seed=seed) for seed in range(3)])
    found, _ = woodbury(factorize(layers), layers, K, 10.0)
    for layer in range(3):
        alone, _ = woodbury(factorize(layers[layer]), layers[layer], K[layer], 10.0)
        assert relative(found[layer], alone) < 1e-9
    grid, _ = woodbury(factorize(layers), layers, K, torch.tensor([1.0, 10.0]))
    assert relative(grid[1], found) < 1e-9


def test_a_float32_factor_is_refined_against_float64(C):
    mild = C + 1e-4 * torch.eye(D)
    Xt, info = woodbury(factorize(mild, torch.float32), mild.float(), keys(), 10.0, full=True, tolerance=1e-7)
    assert info.dtype == "float32"
    assert info.refinements > 0
    assert relative((10 * mild.float().double() + keys().T @ keys()) @ Xt.T, keys().T) < 1e-6


def test_a_factor_of_something_else_is_found_out(C):
    with pytest.raises(SolveError, match="Woodbury's form: relative residual"):
        woodbury(factorize(C + torch.eye(D)), C, keys(), 1.0)


@pytest.mark.parametrize("n", [1, 2, 40, 75])
def test_weight_0_asks_for_equality(C, n):
    """K X = I, and of all such X the one that is least in the metric of C: the limit of small weights."""
    K = keys(n)
    Xt, info = woodbury(factorize(C), C, K, 0)
    assert relative(K @ Xt.T, torch.eye(n)) < 1e-10
    assert relative(Xt, reference.emmet(C, K, 0)) < 1e-6
    other = Xt + 1e-3 * torch.randn(n, D, dtype=torch.float64) @ (torch.eye(D) - torch.linalg.pinv(K) @ K)
    assert relative(K @ other.T, torch.eye(n)) < 1e-9
    for found, worse in zip(Xt, other, strict=True):
        assert found @ C @ found < worse @ C @ worse
    assert relative(woodbury(factorize(C), C, K, 1e-6)[0], Xt) < 1e-3
    assert info.residual < 1e-8
    assert (info.method, info.checked, info.refinements) == ("woodbury", "sampled", 0)


@pytest.mark.parametrize("weight", [0.0, 0.1, 30.0])
def test_emmet_as_published_on_a_factor_with_a_ridge(C, weight):
    ridged = C + 1e-3 * torch.eye(D, dtype=torch.float64)
    Xt, info = woodbury(factorize(C, ridge=1e-3), C, keys(), weight, full=True)
    assert relative(Xt, reference.emmet(ridged, keys(), weight)) < 1e-9
    assert (info.checked, info.ridge) == ("full", 1e-3)


def test_equality_over_all_layers_and_refined(C):
    layers = torch.stack([C + 1e-4 * torch.eye(D), 3 * C + 1e-4 * torch.eye(D)]).float()
    K = torch.stack([keys(seed=seed) for seed in range(2)])
    found, info = woodbury(factorize(layers, torch.float32), layers, K, 0, tolerance=1e-8)
    assert info.dtype == "float32"
    assert info.refinements > 0
    for layer in range(2):
        assert relative(found[layer], reference.emmet(layers[layer], K[layer], 0)) < 1e-6
    with pytest.raises(SolveError, match="with weight 0 the keys must not depend on each other: relative residual"):
        woodbury(factorize(C + torch.eye(D)), C, keys(), 0)


@pytest.mark.parametrize("shift", [0.0, 1e-9])
def test_keys_that_are_equal_need_a_weight(C, shift):
    K = keys().clone()
    K[31] = K[4] * (1 + shift)
    with pytest.raises(SolveError, match=r"keys 4 and 31 are the closest, cosine 1\.0+;.* Set emmet_lambda > 0, or"):
        woodbury(factorize(C), C, K, 0)
    assert relative(woodbury(factorize(C), C, K, 0.1)[0], reference.emmet(C, K, 0.1)) < 1e-6
    with pytest.raises(SolveError, match="Set emmet_lambda"):
        woodbury(factorize(C), C, keys(D + 1), 0)
    with pytest.raises(SolveError, match=r"1 of 1 diagonal elements are not positive.*Set emmet_lambda"):
        woodbury(factorize(C), C, torch.zeros(1, D), 0)


def test_one_bad_column_is_found_by_random_combinations(C):
    """The sampled residual sees a single wrong column of 40."""
    from rewire.kernels.spd_solve.woodbury import _residual

    K, weight = keys(), torch.ones(1, 1, 1, dtype=torch.float64)
    Xt = reference.memit(C, K, 1.0)[None].clone()
    assert _residual(C, K, Xt, weight, False)[0] < 1e-8
    Xt[0, 17] *= 1 + 1e-3
    sampled, full = (_residual(C, K, Xt, weight, whole)[0] for whole in (False, True))
    assert full > 1e-6
    assert 0.2 < sampled / full < 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": -1.0}, "weight is -1.0; expected a positive number"),
        ({"weight": torch.tensor([1.0, 0.0])}, "or the number 0"),
        ({"weight": torch.ones(2, 2)}, r"expected a positive number, \[g\] of them"),
        ({"K": keys()[:, :-1]}, r"K \[40, 299\]"),
        ({"K": keys()[0]}, r"K \[300\]"),
        ({"K": keys().long()}, "int64"),
        ({"K": torch.full((2, D), torch.nan)}, "K holds NaN or infinity"),
    ],
)
def test_wrong_input_is_named(C, change, says):
    call = {"K": keys(), "weight": 1.0} | change
    with pytest.raises(InputError, match=says):
        woodbury(factorize(C), C, call["K"], call["weight"])


def test_factors_are_checked_and_solve():
    A = torch.stack([second_moment(50, 400), second_moment(50, 300)])
    factor = factorize(A)
    B = torch.randn(2, 50, 3, dtype=torch.float64)
    assert isinstance(factor, Factor)
    assert relative(A @ factor.solve(B), B) < 1e-8
    assert factor.dtype == "float64"
    broken = A.clone()
    broken[1, 7] = broken[1, :, 7] = 0
    with pytest.raises(SolveError, match="1 of 100 diagonal elements are not positive, the first in row 7"):
        factorize(broken)
    thin = keys(100)[:, :200]
    with pytest.raises(SolveError, match="broke down at row 1"):
        factorize(thin.T @ thin)


def test_a_batch_is_solved_and_refused_as_one():
    half = torch.randn(5, 20, 30, dtype=torch.float64)
    A, B = half @ half.mT, torch.randn(5, 20, 3, dtype=torch.float64)
    X, info = spd_solve(A, B)
    assert relative(X, reference.solve(A, B)) < 1e-9
    worst = max(spd_solve(a, b)[1].residual for a, b in zip(A, B, strict=True))
    assert info.residual == pytest.approx(worst, rel=1)
    assert spd_solve(A, B[0])[0].shape == (5, 20, 3)
    A[3] -= 1.01 * torch.linalg.eigvalsh(A[3])[0] * torch.eye(20)
    with pytest.raises(SolveError, match="not positive definite"):
        spd_solve(A, B)
    with pytest.raises(InputError, match=r"B is \[4, 20, 3\]; expected \[5, 20, k\]"):
        spd_solve(A, B[:4])


@pytest.mark.parametrize("threshold", [1e-6, 2e-2, 3.0])
def test_null_space_is_kept_as_the_smaller_half(C, threshold):
    values, vectors = torch.linalg.eigh(C)
    space = null_space(C, threshold)
    rank = int((values < threshold).sum())
    assert space.rank == rank
    assert space.basis.shape == (D, min(rank, D - rank))
    assert space.complement == (2 * rank > D)
    assert space.below < threshold <= space.above
    P = vectors[:, :rank] @ vectors[:, :rank].T
    assert relative(space.dense(), P) < 1e-9
    assert relative(space.dense() @ space.dense(), space.dense()) < 1e-12
    assert relative(space.project(keys()), keys() @ P) < 1e-9


def test_an_eigenbasis_serves_every_threshold(C):
    eigen = eigenbasis(C.float())
    assert relative(eigen.vectors @ C.float().double(), eigen.values[:, None] * eigen.vectors) < 1e-12
    assert relative(eigen.vectors @ eigen.vectors.T, torch.eye(D, dtype=torch.float64)) < 1e-12
    assert torch.equal(eigen.values, eigen.values.sort().values)
    for threshold in (1e-6, 2e-2):
        space, alone = eigen.null_space(threshold), null_space(C.float(), threshold)
        assert torch.equal(space.basis, alone.basis)
        assert (space.rank, space.below, space.above) == (alone.rank, alone.below, alone.above)
        # of its own: the other side is not kept in memory with it
        assert space.basis.untyped_storage().nbytes() == 8 * space.basis.numel()


@pytest.mark.parametrize("threshold", [1e-12, 1e6])
def test_a_threshold_outside_the_spectrum_is_refused(C, threshold):
    with pytest.raises(InputError, match=r"of 300 eigenvalues are below .*choose one between"):
        null_space(C, threshold)


@pytest.mark.parametrize("threshold", [1e-3, 2e-2, 3.0])
def test_push_through_is_the_published_system_with_its_history(C, threshold):
    space = null_space(C, threshold)
    P, ridge = space.dense(), 10.0
    system = KeySystem.empty(D, ridge)
    earlier = torch.zeros(0, D, dtype=torch.float64)
    for batch in range(3):
        K = keys(20 + batch, seed=batch)
        Xt, system, info = push_through(space, K, system)
        assert relative(Xt, reference.alphaedit(P, K, earlier, ridge)) < 1e-8
        dense = P @ (K.T @ K + earlier.T @ earlier) + ridge * torch.eye(D)
        assert relative(dense @ Xt.T, P @ K.T) < 1e-8
        assert info.residual < 1e-8
        assert (info.method, info.checked) == ("push-through", "sampled")
        earlier = torch.cat([earlier, K])
    again, _, info = push_through(space, K, KeySystem.empty(D, ridge).append(space.project(earlier[:-22])), full=True)
    assert relative(again, Xt) < 1e-9
    assert info.checked == "full"


def test_push_through_sees_a_history_that_is_not_in_the_null_space(C):
    space = null_space(C, 2e-2)
    outside = KeySystem.empty(D, 10.0).append(keys(5, seed=9))  # not projected
    broken = KeySystem(outside.X, torch.eye(5, dtype=torch.float64), 10.0)
    with pytest.raises(SolveError, match="push-through form"):
        push_through(space, keys(), broken)


def test_a_ridge_must_be_positive():
    with pytest.raises(InputError, match=r"ridge \(L2, mom2_update_weight\) is 0"):
        KeySystem.empty(5, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recursive_least_squares_is_the_inverse_of_the_sum(dtype):
    seen, Q = torch.zeros(0, D, dtype=torch.float64), torch.eye(D, dtype=dtype) / 5
    for batch in range(4):
        K = keys(1 + 7 * batch, seed=batch)
        gain, info = rls_step_(Q, K.to(dtype))
        seen = torch.cat([seen, K])
        exact = torch.linalg.inv(5 * torch.eye(D, dtype=torch.float64) + seen.T @ seen)
        tolerance = 1e-10 if dtype is torch.float64 else 1e-5
        assert relative(Q, exact) < tolerance
        assert relative(gain, K @ exact) < tolerance * 10
        assert torch.equal(Q, Q.T)
        assert info.residual < 1e-6
    assert relative(Q, reference.rls(torch.eye(D) / 5, seen)) < 1e-5
    with pytest.raises(InputError, match=r"K is \[3, 299\]"):
        rls_step_(Q, K[:3, :-1].to(dtype))


def test_a_step_that_fp32_cannot_hold_is_refused_and_changes_nothing():
    Q = torch.full((1, 1), 1e30)
    before = Q.clone()
    with pytest.raises(SolveError, match="not positive"):
        rls_step_(Q, torch.full((1, 1), 1e15))
    assert torch.equal(Q, before)
    Q = 1e6 * torch.eye(D)
    K = 100 * keys(2)
    rls_step_(Q, K.float())
    # the reference inverts a matrix of condition 1e11
    assert relative(Q, reference.rls(1e6 * torch.eye(D), K.float())) < 1e-4


def test_no_keys_and_other_precisions_are_named(C):
    factor = factorize(C)
    with pytest.raises(InputError, match=r"woodbury: K is \[0, 300\]; expected at least one key"):
        woodbury(factor, C, torch.zeros(0, D), 1.0)
    with pytest.raises(InputError, match=r"rls_step_: K is \[0, 300\]"):
        rls_step_(torch.eye(D), torch.zeros(0, D))
    with pytest.raises(InputError, match=r"factorize: dtype=torch\.float16"):
        factorize(C, torch.float16)
    space = null_space(C, 2e-2)
    _, system, _ = push_through(space, keys(3), KeySystem.empty(D, 1.0))
    Xt, same, _ = push_through(space, torch.zeros(0, D), system)
    assert Xt.shape == (0, D)
    assert torch.equal(same.L, system.L)
    assert spd_solve(torch.eye(4, dtype=torch.float64), torch.zeros(4, 0))[0].shape == (4, 0)


def test_a_unit_that_never_fires_is_null():
    C = torch.diag(torch.tensor([0.0, 1e-3, 1.0, 2.0]))
    space = null_space(C, 1e-2)
    assert space.rank == 2
    assert torch.allclose(space.dense(), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)))
    C[0, 2] = 1e-3
    with pytest.raises(InputError, match="not symmetric"):
        null_space(C, 1e-2)


def test_64_small_systems_are_one_call():
    half = torch.randn(64, 32, 40, dtype=torch.float64)
    with recording() as served:
        spd_solve(half @ half.mT, torch.randn(64, 32, 2, dtype=torch.float64))
    assert sum(served.values()) == 1


MUTANTS = {
    "the last row is left out": ("for j in range(0, n):", "for j in range(0, n - 1):"),
    "the wrong system": ("a_ptr + system * n * n + square", "a_ptr + square"),
    "the last column is left out": ("(c[None, :] < k)", "(c[None, :] < k - 1)"),
    "the last block of columns has no owner": ("triton.cdiv(k, _COLUMNS)", "k // _COLUMNS"),
    "no root": ("column / tl.sqrt(pivot)", "column / pivot"),
    "the wrong order back": ("j = n - 1 - step", "j = step"),
    "the status is not written": ("tl.store(status_ptr + system, broke)", "pass"),
}


def poisoned_above(inputs):
    A, B = inputs
    above = torch.ones(A.shape[-2:], dtype=torch.bool).triu(1)
    return A.masked_fill(above, torch.nan), B


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1, in its own process")
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_gate_a_of_small_solve_catches(name, mutate):
    if name:
        mutate("spd_solve", *MUTANTS[name])
    (subject,) = SUBJECTS
    passed = True
    for shape in ({"batch": 3, "n": 7, "k": 35}, {"batch": 2, "n": 4, "k": 1}):
        A, B = inputs_of(subject, shape, torch.float64, "cpu")
        clean, run = (A, B), subject.run
        found = run(poisoned_above(clean), "triton")
        status = found[-1]
        passed &= check(subject, clean, "triton").passed
        passed &= all(bool(torch.isfinite(part).all()) for part in found[:-1])
        passed &= not status.any()
    assert passed == (name is None)
