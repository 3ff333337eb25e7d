"""Keys of a whole session: MEMIT with history, and the system that both it and AlphaEdit keep, also beyond d keys."""

from dataclasses import replace

import pytest
import torch

from rewire.bench.solve import correlated_keys, second_moment
from rewire.kernels.errors import InputError
from rewire.kernels.spd_solve import (
    KeySystem,
    SolveError,
    append_cholesky,
    factorize,
    null_space,
    push_through,
    reference,
    regular_factor,
    spd_solve,
    with_history,
    woodbury,
)

D = 120
BATCHES = (30, 50, 60, 1, 200, 40)  # below d, across it, and far beyond


@pytest.fixture(scope="module")
def C():
    """[120, 120] fp64, condition above 1e7."""
    return second_moment(D, 4 * D)


def keys(n=20, seed=0, d=D):
    return correlated_keys(n, d, seed)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def dense(system):
    """What a system stands for."""
    return system.X.T @ system.X + system.ridge * torch.eye(D, dtype=torch.float64)


@pytest.mark.parametrize("weight", [1e-2, 1.0, 15000.0])
def test_with_history_is_the_system_of_all_keys(C, weight):
    factor, system = factorize(C), KeySystem.empty(D, weight)
    earlier = torch.zeros(0, D, dtype=torch.float64)
    for seed, n in enumerate(BATCHES):
        K = keys(n, seed)
        Xt, system, info = with_history(factor, C, K, system)
        A = weight * C + earlier.T @ earlier + K.T @ K
        assert relative(A @ Xt.T, K.T) < 1e-8
        assert relative(Xt, reference.history(C, K, earlier, weight)) < 10 * float(torch.linalg.cond(A)) * 2.2e-16
        assert info.residual < 1e-8
        assert (info.method, info.checked, info.dtype, info.refinements) == ("history", "sampled", "float64", 0)
        earlier = torch.cat([earlier, K])
        assert len(system.X) == len(earlier)
        assert (system.S is None) == (len(earlier) < D)


def test_the_first_batch_is_plain_memit(C):
    factor = factorize(C)
    Xt, _, info = with_history(factor, C, keys(), KeySystem.empty(D, 10.0), full=True)
    assert relative(Xt, woodbury(factor, C, keys(), 10.0)[0]) < 1e-9
    assert info.checked == "full"
    measured = relative((10 * C + keys().T @ keys()) @ Xt.T, keys().T)
    assert info.residual == pytest.approx(measured, rel=1)


@pytest.mark.parametrize("weight", [1.0, 15000.0])
@pytest.mark.parametrize("sizes", [(25,) * 4, BATCHES])
def test_batches_in_sequence_are_one_batch_of_all(C, sizes, weight):
    """W_t = W_{t-1} + (V_t - W_{t-1} K_tᵀ) X_tᵀ ends where one update of W_0 with all keys does."""
    generator = torch.Generator().manual_seed(5)
    W0 = torch.randn(7, D, generator=generator, dtype=torch.float64)
    K = [keys(n, seed) for seed, n in enumerate(sizes)]
    V = [torch.randn(7, n, generator=generator, dtype=torch.float64) for n in sizes]

    factor, W, system = factorize(C), W0, KeySystem.empty(D, weight)
    for batch, asked in zip(K, V, strict=True):
        Xt, system, _ = with_history(factor, C, batch, system)
        W = W + (asked - W @ batch.T) @ Xt
    every, targets = torch.cat(K), torch.cat(V, 1)
    Xt, *_ = with_history(factor, C, every, KeySystem.empty(D, weight))
    once = (targets - W0 @ every.T) @ Xt
    assert relative(W - W0, once) < 1e-8
    system = weight * C + every.T @ every
    direct = spd_solve(system, every.T @ (targets - W0 @ every.T).T)[0].T
    assert relative(W - W0, direct) < 1e-7

    # without history it does not: or the test would show nothing
    W = W0
    for batch, asked in zip(K, V, strict=True):
        W = W + (asked - W @ batch.T) @ with_history(factor, C, batch, KeySystem.empty(D, weight))[0]
    assert relative(W - W0, once) > 1e-3


def test_a_deficient_c_gets_its_ridge(C):
    C = C.clone().float()
    C[[5, 17]] = C[:, [5, 17]] = 0
    factor, system = regular_factor(C), KeySystem.empty(D, 15.0)
    assert factor.ridge > 0
    ridged = C.double() + factor.ridge * torch.eye(D, dtype=torch.float64)
    _, system, _ = with_history(factor, C, keys(100), system)
    Xt, _, info = with_history(factor, C, keys(30, 1), system)
    assert info.ridge == factor.ridge
    assert relative(Xt, reference.history(ridged, keys(30, 1), keys(100), 15.0)) < 1e-6


@pytest.mark.parametrize("earlier", [40, 300])
def test_a_float32_factor_is_refined(C, earlier):
    mild = (C + 1e-4 * torch.eye(D)).float()
    factor, system = factorize(mild, torch.float32), KeySystem.empty(D, 10.0)
    _, system, _ = with_history(factor, mild, keys(earlier, 1), system)
    Xt, _, info = with_history(factor, mild, keys(), system, tolerance=1e-9)
    assert info.dtype == "float32"
    assert info.refinements > 0
    A = 10 * mild.double() + keys(earlier, 1).T @ keys(earlier, 1) + keys().T @ keys()
    assert relative(A @ Xt.T, keys().T) < 1e-5  # earlier keys are known to fp32


def test_a_factor_of_something_else_is_found_out(C):
    with pytest.raises(SolveError, match="the form with history: relative residual"):
        with_history(factorize(C + torch.eye(D)), C, keys(), KeySystem.empty(D, 1.0))


@pytest.mark.parametrize("earlier", [40, 300])
def test_a_system_that_lost_its_keys_is_found_out(C, earlier):
    factor, empty = factorize(C), KeySystem.empty(D, 1.0)
    _, system, _ = with_history(factor, C, keys(earlier, 1), empty)
    other = empty.append(keys(earlier, 2))
    with pytest.raises(SolveError, match=r"the form with history|not positive definite"):
        with_history(factor, C, keys(), replace(other, X=system.X))
    if earlier > D:
        with pytest.raises(SolveError, match="push-through form"):
            push_through(null_space(C, 2e-2), keys(), replace(other, X=system.X))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"K": keys()[:, :-1]}, r"K \[20, 119\] torch\.float64; expected \[120, 120\]"),
        ({"K": keys()[0]}, r"K \[120\]"),
        ({"K": keys().long()}, "int64"),
        ({"C": torch.eye(3)}, r"C is \[3, 3\], its factor \[120, 120\]"),
        ({"K": keys().to("meta")}, "K is on meta, C on cpu"),
        ({"before": KeySystem.empty(7, 1.0)}, "for earlier keys of width 7"),
        ({"K": torch.full((2, D), torch.nan)}, "K holds NaN or infinity"),
    ],
)
def test_wrong_input_is_named(C, change, says):
    call = {"C": C, "K": keys(), "before": KeySystem.empty(D, 1.0)} | change
    with pytest.raises(InputError, match=says):
        with_history(factorize(C), **call)


@pytest.mark.parametrize("ridge", [1e-3, 10.0])
def test_a_system_is_that_of_its_keys_on_either_side_of_d(ridge):
    system = KeySystem.empty(D, ridge)
    V = torch.randn(D, 3, dtype=torch.float64)
    for seed, n in enumerate((1, 70, D - 72, 1, 1, 5, 400)):
        system = system.append(keys(n, seed))
        N = len(system.X)
        assert (system.S is None) == (N < D)
        assert system.L.shape == ((N, N) if N < D else (0, 0))
        assert system.S is None or system.S.shape == (D, D)
        found, condition = system.newest(n)
        assert relative(dense(system) @ found.T, keys(n, seed).T) < 1e-8
        assert relative(dense(system) @ system.solve(V), V) < 1e-6
        assert condition >= 1
    assert torch.equal(system.X[:1], keys(1, 0))
    assert system.newest(0)[0].shape == (0, D)


@pytest.mark.parametrize("first", [50, D, 130, 500])
@pytest.mark.parametrize("last", [1, 60, 90, 700])
def test_keys_go_as_they_came(first, last):
    before = KeySystem.empty(D, 10.0).append(keys(first))
    after = before.append(keys(last, 1))
    again = after.without_last(last)
    assert torch.equal(again.X, before.X)
    assert again.L.shape == before.L.shape
    assert relative(dense(again), dense(before)) == 0
    if len(after.X) < D:
        assert torch.equal(again.L, before.L)
    elif before.S is None:
        assert relative(again.L, before.L) < 1e-12
    else:
        assert relative(again.S, before.S) < 1e-14 * (1 + last / first)
    (found, _), (wanted, _) = again.newest(first), before.newest(first)
    assert relative(found, wanted) < 1e-9
    grown = again.append(keys(last, 1))
    assert relative(grown.newest(last)[0], after.newest(last)[0]) < 1e-9
    assert before.append(keys(last, 1)).newest(last)[0].equal(after.newest(last)[0])  # nothing was changed in place


def test_a_factor_grows_by_blocks():
    A = second_moment(60, 300)
    L = torch.zeros(0, 0, dtype=torch.float64)
    for start, stop in ((0, 25), (25, 26), (26, 60)):
        L = append_cholesky(L, A[start:stop, :start], A[start:stop, start:stop])
    assert relative(L @ L.T, A) < 1e-12
    assert torch.equal(L, L.tril())
    with pytest.raises(SolveError, match="broke down at row 61"):
        append_cholesky(L, A[:1], 0.99 * A[:1, :1])


def test_keys_are_forgotten_without_a_copy(C):
    space = null_space(C, 2e-2)
    first = KeySystem.empty(D, 1.0).append(space.project(keys(20)))
    both = first.append(space.project(keys(7, seed=1)))
    again = both.without_last(7)
    assert torch.equal(again.X, first.X)
    assert relative(again.L, first.L) < 1e-12
    assert again.X.untyped_storage().data_ptr() == both.X.untyped_storage().data_ptr()
    grown = again.append(space.project(keys(7, seed=1)))
    assert relative(grown.L, both.L) < 1e-12


def test_a_session_forgets_batch_after_batch(C):
    """From far beyond d back to none, each state solving as the one before the batch did."""
    factor, system, states = factorize(C), KeySystem.empty(D, 100.0), []
    for seed, n in enumerate(BATCHES):
        states.append(system)
        _, system, _ = with_history(factor, C, keys(n, seed), system)
    for n, state in zip(reversed(BATCHES), reversed(states), strict=True):
        system = system.without_last(n)
        assert torch.equal(system.X, state.X)
        found, wanted = (with_history(factor, C, keys(9, 77), each)[0] for each in (system, state))
        assert relative(found, wanted) < 1e-9
    assert len(system.X) == 0


def test_alphaedit_beyond_d_keys(C):
    space = null_space(C, 2e-2)
    P, system = space.dense(), KeySystem.empty(D, 10.0)
    earlier = torch.zeros(0, D, dtype=torch.float64)
    for seed, n in enumerate(BATCHES):
        K = keys(n, seed)
        Xt, system, info = push_through(space, K, system)
        assert relative(Xt, reference.alphaedit(P, K, earlier, 10.0)) < 1e-8
        assert info.residual < 1e-8
        assert info.method == "push-through"
        earlier = torch.cat([earlier, K])
    undone, _, _ = push_through(space, K, system.without_last(BATCHES[-1]))
    assert relative(undone, Xt) < 1e-10


def test_memory_ends_at_one_square(C):
    system = KeySystem.empty(D, 1.0)
    for seed in range(12):
        system = system.append(keys(50, seed))
    held = sum(each.untyped_storage().nbytes() for each in (system.X, system.L, system.S))
    assert held == 8 * (600 * D + D * D)


def test_no_keys_change_nothing(C):
    _, system, _ = with_history(factorize(C), C, keys(), KeySystem.empty(D, 1.0))
    Xt, same, info = with_history(factorize(C), C, keys()[:0], system)
    assert Xt.shape == (0, D)
    assert torch.equal(same.L, system.L)
    assert info.residual == 0
