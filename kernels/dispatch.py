"""Which implementation of an operation serves a call. What each can serve is data, and so is the reason why not."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from .errors import InputError

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "torch", "triton")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WIDE = (*FLOATS, torch.float64)  # float64 is served by torch alone

_preferred: ContextVar[str] = ContextVar("preferred", default="auto")
_recorders: ContextVar[tuple[Counter[tuple[str, str]], ...]] = ContextVar("recorders", default=())


@dataclass(frozen=True)
class Refusal:
    """Why an implementation cannot serve a call.

    need: what is missing: "package", "device", "compute capability", "dtype", or the name of a size ("rank")
    found, expected: of it
    """

    need: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.need} is {self.found}; expected {self.expected}"


@dataclass(frozen=True)
class Capability:
    """What an implementation can serve; what is left open does not matter.

    package: that must be installed
    device: type of the device that all tensors must be on
    compute: least CUDA compute capability
    dtypes: of the floating-point tensors
    sizes: name -> (least, most); an operation measures its arguments by these names
    """

    package: str | None = None
    device: str | None = None
    compute: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def refusal(self, tensors: list[torch.Tensor], sizes: Mapping[str, int]) -> Refusal | None:
        """Why a call on these tensors, of these sizes, cannot be served, or None."""
        if self.package is not None and not installed(self.package):
            return Refusal("package", f"{self.package}, not installed", "it to be installed")
        dtypes, device, compute = self.dtypes, self.device, self.compute
        if self.package == "triton" and interpreting():
            # its NumPy has no bf16: it would compute with the raw bits as integers and say nothing
            dtypes = tuple(d for d in dtypes or FLOATS if d is not torch.bfloat16)
            device = compute = None
        for tensor in tensors:
            place = tensor.device
            if device is not None and place.type != device:
                return Refusal("device", str(place), f"{device} (or TRITON_INTERPRET=1)")
            if dtypes is not None and tensor.is_floating_point() and tensor.dtype not in dtypes:
                return Refusal("dtype", _name(tensor.dtype), ", ".join(map(_name, dtypes)))
        if compute is not None:
            place = tensors[0].device
            if torch.version.hip or torch.cuda.get_device_capability(place) < compute:
                expected = f"an NVIDIA GPU of {'.'.join(map(str, compute))} or higher"
                return Refusal("compute capability", torch.cuda.get_device_name(place), expected)
        for name, (least, most) in self.sizes.items():
            if not least <= sizes[name] <= most:
                return Refusal(name, str(sizes[name]), f"{least} to {most}")
        return None


TORCH = Capability()
TRITON = Capability("triton", "cuda", (8, 0), FLOATS)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation, and what it can serve."""

    run: Callable[..., Any]
    capability: Capability


class Operation:
    """A named operation and its implementations, the preferred one first.

    sizes: measures the arguments, for the capabilities that are bounded in a size
    """

    def __init__(
        self, name: str, sizes: Callable[..., Mapping[str, int]] | None = None, **implementations: Implementation
    ) -> None:
        self.name = name
        self.sizes = sizes
        self.implementations = implementations
        self._said: set[str] = set()

    def __call__(self, *args: Any, impl: str = "auto") -> Any:
        """Run ``args`` by ``impl``; "auto": by what :func:`using` asks for, else by the first that can serve them.

        Raises InputError: unknown ``impl``, or it cannot serve these arguments; the message holds the reason.
        """
        name = self.choose(*args, impl=impl)
        for counter in _recorders.get():
            counter[self.name, name] += 1
        return self.implementations[name].run(*args)

    def choose(self, *args: Any, impl: str = "auto") -> str:
        """The name of the implementation that serves a call; arguments and errors as of a call."""
        if impl not in IMPLEMENTATIONS:
            raise InputError(f"{self.name}: impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        asked = _preferred.get() if impl == "auto" else impl
        if asked not in self.implementations:
            if impl != "auto":
                raise InputError(f"{self.name}: there is no {impl} implementation; expected impl='auto'")
            asked = "auto"
        reasons = []
        for name in self.implementations if asked == "auto" else (asked,):
            refusal = self.refusal(name, *args)
            if refusal is None:
                return name
            reasons.append(f"{self.name}: {name} cannot serve this call: {refusal}")
            if asked == "auto" and reasons[-1] not in self._said:
                self._said.add(reasons[-1])
                log.info(reasons[-1])
        raise InputError("; ".join(reasons))

    def refusal(self, name: str, *args: Any) -> Refusal | None:
        """Why the implementation ``name`` cannot serve ``args``, or None."""
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        sizes = self.sizes(*args) if self.sizes else {}
        return self.implementations[name].capability.refusal(tensors, sizes)


@contextmanager
def using(impl: str) -> Iterator[None]:
    """Inside, operations called with impl="auto" are served by ``impl`` where they have one of that name, or raise.

    Raises InputError: ``impl`` is none of IMPLEMENTATIONS.
    """
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    token = _preferred.set(impl)
    try:
        yield
    finally:
        _preferred.reset(token)


@contextmanager
def recording() -> Iterator[Counter[tuple[str, str]]]:
    """Counts the calls made inside: (operation, implementation) -> calls."""
    counter: Counter[tuple[str, str]] = Counter()
    token = _recorders.set((*_recorders.get(), counter))
    try:
        yield counter
    finally:
        _recorders.reset(token)


@functools.cache  # looked up for every call otherwise
def installed(package: str) -> bool:
    return find_spec(package) is not None


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (it reads this when a kernel is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
