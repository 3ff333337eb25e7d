"""An operation that tests of the benches make up, and ways to get it wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewire.bench import kernels
from rewire.bench.ceilings import TINY
from rewire.bench.check import Subject
from rewire.kernels.dispatch import TORCH, Implementation, Operation
from rewire.kernels.floors import Cost

CPU = torch.device("cpu")
COPIES = 2**16  # bytes of a cache that tests rotate past


def double(x: Tensor) -> Tensor:
    return x * 2


def make(shape: Any, dtype: torch.dtype, device: torch.device, seed: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(shape["n"], generator=seed).to(device, dtype),)


def subject(
    torch_: Callable[[Tensor], Tensor] = double, triton_: Callable[[Tensor], Tensor] | None = None, **changes: Any
) -> Subject:
    """An operation that doubles; `torch_` and `triton_` compute it, both on the CPU."""
    kinds = {"triton": triton_, "torch": torch_}
    operation = Operation("double", **{name: Implementation(run, TORCH) for name, run in kinds.items() if run})
    usual: dict[str, Any] = {
        "operation": operation,
        "make": make,
        "run": lambda inputs, impl: (operation(*inputs, impl=impl),),
        "exact": lambda inputs: (double(inputs[0].double()),),
        "plain": lambda inputs: (double(inputs[0]),),
        "cost": lambda shape, dtype: Cost(shape["n"], 2 * shape["n"] * dtype.itemsize),
        "odd": ({"n": 7}, {"n": 0}),
        "small": ({"n": 1000},),
        "large": ({"n": 1000},),
        "dtypes": (torch.float32,),
    }
    return Subject(**usual | changes)


def bench(*subjects: Subject, **options: Any) -> dict[str, Any]:
    return kernels.bench_kernels("cpu", seconds=0.005, found=subjects, sizes=TINY, **options)


def rows_of(result: dict[str, Any]) -> dict[str, Any]:
    return {row["provider"]: row for row in result["rows"]}


def wrong_where(condition: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    return lambda x: double(x) + (1.0 if condition(x) else 0.0)


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nsecond line")
