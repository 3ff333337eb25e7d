"""Is an operation right? The one rule of the house, used by the tests, by `rewire bench kernels` and on a GPU.

Below the command line this needs torch, Triton and NumPy only.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import FLOATS, Operation
from ..kernels.floors import Cost

Shape = Mapping[str, int]
Inputs = tuple[Any, ...]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """An operation as tests and benchmarks see it: inputs made from shapes, and what to compare with.

    make: (shape, dtype, device, generator of the CPU) -> inputs; some strided, some empty, as the shape says
    run: (inputs, impl) -> outputs, without changing the inputs
    exact: inputs -> outputs, computed in float64 from the same inputs by the operation's reference
    plain: inputs -> outputs of plain torch in the inputs' dtype
    library: name -> the best library calls that do the same job: inputs -> outputs, or some of them, in order
    cost: (shape, dtype) -> least FLOPs and bytes (`kernels.floors`)
    odd: shapes for correctness: not multiples of anything, one row, none at all; small enough for the interpreter
    small, large: shapes to time on a CPU, and on a GPU (those of Llama-3-8B and GPT-J-6B)
    dtypes: that it takes
    timed: provider ("torch", "triton", "plain", a name of `library`) -> the call to time, where the one that is checked
        does more than the operation (fresh zeros, a triangle cut out); what it returns is not looked at
    beside: name -> plain torch that does another job and is timed to compare with: the product without the delta
    """

    operation: Operation
    make: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Inputs]
    run: Callable[[Inputs, str], Outputs]
    exact: Callable[[Inputs], Outputs]
    plain: Callable[[Inputs], Outputs]
    cost: Callable[[Shape, torch.dtype], Cost]
    odd: tuple[Shape, ...]
    small: tuple[Shape, ...]
    large: tuple[Shape, ...]
    library: Mapping[str, Callable[[Inputs], Outputs]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOATS
    timed: Mapping[str, Callable[[Inputs], object]] = field(default_factory=dict)
    beside: Mapping[str, Callable[[Inputs], object]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.operation.name


@dataclass(frozen=True)
class Verdict:
    """error, plain_error: the largest max |y - y64| / max |y64| of an output, of the operation and of plain torch."""

    error: float
    plain_error: float
    passed: bool


def inputs_of(subject: Subject, shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Inputs:
    """The same numbers on every device."""
    return subject.make(shape, dtype, torch.device(device), torch.Generator().manual_seed(seed))


def check(subject: Subject, inputs: Inputs, impl: str) -> Verdict:
    """Run once, fresh memory poisoned with NaN: each output's error is at most twice that of plain torch, plus 1e-6."""
    with poisoned():
        found = subject.run(inputs, impl)
    return verdict(found, subject.exact(inputs), subject.plain(inputs))


def verdict(found: Outputs, exact: Outputs, plain: Outputs) -> Verdict:
    errors = [relative_error(y, y64) for y, y64 in zip(found, exact, strict=True)]
    plains = [relative_error(y, y64) for y, y64 in zip(plain, exact, strict=True)]
    passed = all(e <= 2 * p + 1e-6 for e, p in zip(errors, plains, strict=True))  # false for NaN
    return Verdict(max(errors, default=0.0), max(plains, default=0.0), passed)


def relative_error(y: Tensor, exact: Tensor) -> float:
    """max |y - exact| / max |exact|; NaN where y holds one, infinity where the shapes differ."""
    if y.shape != exact.shape:
        return float("inf")
    if not y.numel():
        return 0.0
    exact = exact.to(y.device)
    return float((y.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised is NaN inside: an output that nobody wrote shows."""
    makers = {(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")}
    own = {(place, name): getattr(place, name) for place, name in makers}

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for (place, name), make in own.items():
        setattr(place, name, poison(make))
    try:
        yield
    finally:
        for (place, name), make in own.items():
            setattr(place, name, make)
