"""Which implementation of an operation serves a call. The reason why one cannot is data, not a lost branch."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. ``refuse`` takes the arguments of ``run``: why it cannot serve them, or None."""

    run: Callable[..., Any]
    refuse: Callable[..., str | None]


class Operation:
    """A named operation and its implementations, the preferred one first; ``calls`` counts what served."""

    def __init__(self, name: str, **implementations: Implementation) -> None:
        self.name = name
        self.implementations = implementations
        self.calls: Counter[str] = Counter()
        self._said: set[str] = set()

    def __call__(self, *args: Any, impl: str = "auto") -> Any:
        """Run ``args`` by ``impl``, or by the first that does not refuse (``auto``).

        Raises InputError: unknown ``impl``, or none may serve these arguments; the message holds the reasons.
        """
        if impl != "auto" and impl not in self.implementations:
            raise InputError(f"{self.name}: impl={impl!r} is not one of {', '.join(['auto', *self.implementations])}")
        reasons = []
        for name, implementation in self.implementations.items():
            if impl not in ("auto", name):
                continue
            reason = implementation.refuse(*args)
            if reason is None:
                self.calls[name] += 1
                return implementation.run(*args)
            reasons.append(f"{self.name}: {name} cannot serve this call: {reason}")
            if impl == "auto" and reasons[-1] not in self._said:
                self._said.add(reasons[-1])
                log.info(reasons[-1])
        raise InputError("; ".join(reasons))


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (it reads this when a kernel is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_triton(*tensors: torch.Tensor) -> str | None:
    """Why no Triton kernel can serve these tensors (all on one device), or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if interpreting():
        # its NumPy has no bf16: it would compute with the raw bits as integers and say nothing
        return "the interpreter cannot compute bfloat16" if any(t.dtype is torch.bfloat16 for t in tensors) else None
    device = tensors[0].device
    if device.type != "cuda":
        return f"the tensors are on {device}, no CUDA device (and TRITON_INTERPRET=1 is not set)"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is no NVIDIA GPU of compute capability 8.0 or higher"
    return None
