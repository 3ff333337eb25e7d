"""The closed forms in the number of keys against the dense LU of the published procedures, checked in the same run."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..kernels.spd_solve import (
    Factor,
    KeySystem,
    NullSpace,
    factorize,
    null_space,
    push_through,
    reference,
    spd_solve,
    woodbury,
)
from .timing import peak_bytes, single

WEIGHT = 100.0  # lambda
RIDGE = 10.0  # L2, as in the published presets
THRESHOLD = 2e-2  # of the null space, as in the published presets
TOLERANCE = 1e-8  # full relative residual that every solution must have in float64
DECADES = 8.5  # that the eigenvalues of the keys' covariance span
CURVE = 0.7  # they fall faster at first, as real ones do: a fifth of the directions lies above the threshold

REPEATS = 5  # before the baseline, and behind it

Tick = Callable[[int, int], None]
Call = Callable[[], Any]


def correlated_keys(count: int, d: int, seed: int) -> Tensor:
    """[count, d] fp64 keys; the eigenvalues of their covariance fall from 10 by `DECADES`, in a rotated basis.

    The rotation is the discrete Hartley transform: orthogonal, mixes all columns, and costs d log d a key.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.linspace(0, 1, d, dtype=torch.float64)
    spectrum = 10 ** ((1 - DECADES * place**CURVE) / 2)
    found = torch.fft.fft(torch.randn(count, d, generator=generator, dtype=torch.float64) * spectrum)
    return (found.real - found.imag) / d**0.5


def second_moment(d: int, count: int) -> Tensor:
    """[d, d] fp64: mean of k kᵀ over `count` correlated keys."""
    C = torch.zeros(d, d, dtype=torch.float64)
    for start in range(0, count, 4096):
        keys = correlated_keys(min(4096, count - start), d, seed=1000 + start)
        C.addmm_(keys.T, keys, alpha=1 / count)
    return (C + C.T) / 2


def bench_solve(d: int, n: int, device: str = "cpu", progress: Tick = lambda done, total: None) -> dict[str, Any]:
    """{"check", "condition", "worst", "rows"}: ratios of Woodbury, push-through and batched systems to their baselines.

    "seconds" has factor and null space made before, "ratio_with_factor" counts them in. The baseline is the published
    procedure, written plainly: the dense system is formed and solved by LU; "ratio_to_lu" is to that LU alone. Every
    residual is checked inside the timing on 8 random combinations of columns, and afterwards in full against the dense
    system (`worst`); above 1e-8 there are no rows.
    """
    place = torch.device(device)
    C = second_moment(d, 4 * d).to(place)
    K, earlier = (correlated_keys(n, d, seed).to(place) for seed in (1, 2))
    rows: list[dict[str, Any]] = []
    residuals = []
    progress(1, 6)

    def compare(
        name: str, shape: dict[str, int], ours: Call, published: Call, lu: Call | None = None, factor: float = 0.0
    ) -> Tensor:
        found: Tensor
        found, *_, info = ours()
        times = [single(ours, place).p50 for _ in range(REPEATS)]
        slow = single(published, place).p50
        alone = single(lu, place).p50 if lu else slow
        seconds = median([*times, *(single(ours, place).p50 for _ in range(REPEATS))])
        rows.append(
            {
                "name": name,
                "dtype": "float64",
                "shape": shape,
                "seconds": seconds,
                "baseline_seconds": slow,
                "ratio": slow / seconds,
                "ratio_to_lu": alone / seconds,
                "factor_seconds": factor,
                "ratio_with_factor": slow / (seconds + factor),
                "peak_bytes": peak_bytes(ours, place),
                "residual": info.residual,
            }
        )
        progress(2 * len(rows), 6)
        return found

    factor = factorize(C, torch.float64)
    seconds = single(lambda: factorize(C, torch.float64), place).p50
    system = WEIGHT * C + K.T @ K
    Xt = compare(
        "memit: woodbury",
        {"d": d, "n": n},
        lambda: woodbury(factor, C, K, WEIGHT),
        lambda: reference.memit(C, K, WEIGHT),
        lambda: torch.linalg.solve(system, K.T),
        seconds,
    )
    residuals.append(relative(system @ Xt.T, K.T))

    space: NullSpace = null_space(C, THRESHOLD)
    seconds = single(lambda: null_space(C, THRESHOLD), place).p50
    _, before, _ = push_through(space, earlier, KeySystem.empty(d, RIDGE, place))
    P = space.dense()
    system = P @ (K.T @ K + earlier.T @ earlier)
    system.diagonal().add_(RIDGE)
    B = P @ K.T
    Xt = compare(
        "alphaedit: push-through",
        {"d": d, "n": n, "earlier": n, "kept": space.basis.shape[1]},
        lambda: push_through(space, K, before),
        lambda: reference.alphaedit(P, K, earlier, RIDGE),
        lambda: torch.linalg.solve(system, B),
        seconds,
    )
    residuals.append(relative(system @ Xt.T, B))

    generator = torch.Generator().manual_seed(3)
    half = torch.randn(64, 32, 40, generator=generator, dtype=torch.float64).to(place)
    A, B = half @ half.mT, torch.randn(64, 32, 8, generator=generator, dtype=torch.float64).to(place)
    X = compare(
        "64 systems in one call",
        {"batch": 64, "n": 32, "k": 8},
        lambda: spd_solve(A, B, torch.float64),
        lambda: [spd_solve(a, b, torch.float64) for a, b in zip(A, B, strict=True)],
    )
    residuals.append(relative(A @ X, B))
    passed = all(residual <= TOLERANCE for residual in residuals)  # false for NaN
    return {
        "check": "passed" if passed else "failed",
        "worst": float(torch.tensor(residuals).max()),  # NaN where one is
        "condition": condition_of(C, factor),
        "rows": rows if passed else [],
    }


def condition_of(C: Tensor, factor: Factor) -> float:
    """Lower bound of C's condition: by power iteration, and inverse iteration on its factor."""
    largest = smallest = torch.ones(len(C), 1, dtype=C.dtype, device=C.device)
    for _ in range(30):
        largest = C @ (largest / largest.norm())
        smallest = factor.solve(smallest / smallest.norm())
    return float(largest.norm() * smallest.norm())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))
