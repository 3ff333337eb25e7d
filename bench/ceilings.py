"""What a chip can do at best, measured: products, copies and the factorisations that edits need. Floors follow.

Below the command line this needs torch only.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..kernels.floors import Cost
from .timing import Timing, measure, rotation, single

Found = dict[str, Any]
SAMPLED = 16  # rows or columns that are checked against float64


@dataclass(frozen=True)
class Sizes:
    """What to measure at: `large` is for a GPU.

    products: dtype -> n of an [n, n] product; copy: bytes; factors: n of Cholesky and of the triangular solve;
    columns: of its right-hand sides; eigh: n, the smaller first: it predicts whether the larger one fits `patience` (s)
    seconds: to time each for
    """

    products: Mapping[torch.dtype, int]
    copy: int
    factors: tuple[int, ...] = ()
    columns: int = 1000
    eigh: tuple[int, ...] = ()
    patience: float = 20.0
    seconds: float = 0.5


HALVES = (torch.bfloat16, torch.float16)
LARGE = Sizes(
    products={torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 8192, torch.float64: 4096},
    copy=2**31, factors=(14336, 16384), eigh=(4096, 14336),
)  # fmt: skip
SMALL = Sizes(products={torch.float32: 1024, torch.float64: 768, **dict.fromkeys(HALVES, 512)}, copy=2**28)
TINY = Sizes(
    products={torch.float32: 256, torch.float64: 128, **dict.fromkeys(HALVES, 128)},
    copy=2**20, factors=(160,), columns=10, eigh=(64, 96), seconds=0.01,
)  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """products: dtype -> FLOP/s; copy: bytes/s, read and written ones together; rows: all that was measured."""

    products: Mapping[torch.dtype, float] = field(default_factory=dict)
    copy: float = math.nan
    rows: list[Found] = field(default_factory=list)

    def floor(self, cost: Cost, dtype: torch.dtype, device: torch.device) -> float | None:
        """Seconds that nothing falls below which multiplies at that dtype's rate and copies at that of memory."""
        rate = self.products.get(dtype, 0.0)
        if device.type == "cpu" and dtype.itemsize == 2:  # where 16-bit products are slow, converting first is faster
            rate = max(rate, self.products.get(torch.float32, 0.0))
        if not rate or not self.copy > 0:
            return None
        return max(cost.flops / rate, cost.bytes / self.copy)


def measure_products(sizes: Sizes, device: torch.device) -> Iterator[Found]:
    """One row a dtype, and the copy's; each with its check."""
    for dtype, n in sizes.products.items():
        yield _row("product", dtype, {"n": n}, device, partial(_product, n, dtype, device, sizes.seconds))
    yield _row("copy", torch.uint8, {"bytes": sizes.copy}, device, partial(_copy, sizes.copy, device, sizes.seconds))


def measure_factors(sizes: Sizes, device: torch.device, why_not: Callable[[], str] = str) -> Iterator[Found]:
    """Cholesky, triangular solve and eigenvalues, in fp32 and fp64; `why_not`: a reason to leave out the next one."""
    both = (torch.float32, torch.float64)
    for n, dtype in product(sizes.factors, both):
        late, columns = why_not(), sizes.columns
        yield _row("potrf", dtype, {"n": n}, device, partial(_potrf, n, dtype, device, sizes.seconds), late)
        shape = {"n": n, "columns": columns}
        yield _row("trsm", dtype, shape, device, partial(_trsm, n, columns, dtype, device, sizes.seconds), late)
    before: dict[torch.dtype, tuple[int, float]] = {}
    for n, dtype in product(sizes.eigh, both):
        late = why_not()
        if dtype in before and not late:
            m, seconds = before[dtype]
            predicted = seconds * (n / m) ** 3
            if predicted > sizes.patience:
                late = f"would take some {predicted:.0f} s, by n³ from n = {m}; at most {sizes.patience:.0f} s"
        row = _row("eigh", dtype, {"n": n}, device, partial(_eigh, n, dtype, device), late)
        if row["status"] == "measured":
            before[dtype] = n, row["seconds"]
        yield row


def ceilings_of(rows: list[Found]) -> Ceilings:
    """From the rows of `measure_products`."""
    good = [row for row in rows if row["status"] == "measured"]
    products = {getattr(torch, row["dtype"]): row["rate"] for row in good if row["name"] == "product"}
    copies = [row["rate"] for row in good if row["name"] == "copy"]
    return Ceilings(products, copies[0] if copies else math.nan, rows)


def quick(device: torch.device, dtypes: Iterable[torch.dtype], seconds: float = 0.1) -> Ceilings:
    """Of products in these dtypes and the copy, at one size each, `seconds` each."""
    cuda = device.type == "cuda"
    products = {dtype: 4096 if cuda else SMALL.products.get(dtype, 512) for dtype in dtypes}
    sizes = Sizes(products, copy=2**31 if cuda else 2**27, seconds=seconds)
    return ceilings_of(list(measure_products(sizes, device)))


# (timing, work of a call: FLOPs or bytes, the error found, its bound)
Measured = tuple[Timing, float, float, float]


def _row(
    name: str,
    dtype: torch.dtype,
    shape: Mapping[str, int],
    device: torch.device,
    work: Callable[[], Measured],
    why_not: str = "",
) -> Found:
    if why_not:
        return _unmeasured(name, dtype, shape, why_not)
    try:
        timing, amount, error, bound = work()
    except Exception as failure:
        return _unmeasured(name, dtype, shape, reason_of(failure))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    row = _unmeasured(name, dtype, shape, "") | {"error": error, "bound": bound}
    if not error <= bound:  # NaN too
        return row | {"status": "wrong", "note": f"error {error:.1e}, at most {bound:.1e} expected"}
    figures = {"seconds": timing.p50, "p20": timing.p20, "p80": timing.p80, "rate": None}
    if not math.isnan(amount):
        figures["rate"] = amount / timing.p20  # a ceiling: what disturbs it is not of the chip
    return row | {"status": "measured"} | figures


def _unmeasured(name: str, dtype: torch.dtype, shape: Mapping[str, int], reason: str) -> Found:
    kind = str(dtype).removeprefix("torch.")
    return {"name": name, "dtype": kind, "shape": dict(shape), "status": "not measured", "note": reason}


def reason_of(failure: BaseException) -> str:
    """One line."""
    text = str(failure).strip().split("\n")[0]
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in text:
        return f"out of memory: {text}"
    return f"{type(failure).__name__}: {text}" if type(failure).__name__ != "InputError" else text


def _time(call: Callable[[Any], object], inputs: Any, device: torch.device, seconds: float) -> Timing:
    timings, failures = measure({"it": call}, rotation(inputs, device), device, seconds, seconds / 10, least=3)
    for failure in failures.values():
        raise failure
    return timings["it"]


def _product(n: int, dtype: torch.dtype, device: torch.device, seconds: float) -> Measured:
    A, B = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    exact = A[:SAMPLED].double() @ B.double()
    error = float(((A @ B)[:SAMPLED].double() - exact).abs().max() / exact.abs().max())
    # rounding of the result, and of sums of n; tf32 in place of fp32 would pass it by far
    bound = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else math.sqrt(n))
    return _time(lambda pair: pair[0] @ pair[1], (A, B), device, seconds), 2 * n**3, error, bound


def _copy(size: int, device: torch.device, seconds: float) -> Measured:
    source = torch.randint(0, 256, (2**16,), dtype=torch.uint8, device=device).repeat(size >> 16)
    target = torch.empty_like(source)
    target.copy_(source)
    wrong = float(not torch.equal(source, target))
    return _time(lambda pair: pair[1].copy_(pair[0]), (source, target), device, seconds), 2 * size, wrong, 0.0


def _spd(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    G = torch.randn(n, 64, dtype=dtype, device=device)
    A = G @ G.T / 64
    A.diagonal().add_(1)
    return A


def _potrf(n: int, dtype: torch.dtype, device: torch.device, seconds: float) -> Measured:
    A = _spd(n, dtype, device)
    L = torch.linalg.cholesky(A)
    error = float((L[:SAMPLED].double() @ L.double().T - A[:SAMPLED].double()).abs().max() / A.abs().max())
    bound = torch.finfo(dtype).eps * n
    return _time(torch.linalg.cholesky_ex, A, device, seconds), n**3 / 3, error, bound


def _trsm(n: int, columns: int, dtype: torch.dtype, device: torch.device, seconds: float) -> Measured:
    L = torch.linalg.cholesky(_spd(n, dtype, device))
    B = torch.randn(n, columns, dtype=dtype, device=device)

    def solve(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.linalg.solve_triangular(pair[0], pair[1], upper=False)

    left = L.double() @ solve((L, B))[:, :SAMPLED].double()
    error = float((left - B[:, :SAMPLED]).abs().max() / B.abs().max())
    bound = torch.finfo(dtype).eps * n
    return _time(solve, (L, B), device, seconds), n * n * columns, error, bound


def _eigh(n: int, dtype: torch.dtype, device: torch.device) -> Measured:
    A = _spd(n, dtype, device)
    values, vectors = torch.linalg.eigh(A)
    some = vectors[:, :SAMPLED].double()
    error = float((A.double() @ some - some * values[:SAMPLED].double()).abs().max() / values.abs().max())
    bound = torch.finfo(dtype).eps * n
    return single(lambda: torch.linalg.eigh(A), device), math.nan, error, bound  # its FLOPs depend on the matrix
