"""The configurations that a Triton kernel picks from: which modules have a table, and how to take one of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from ..kernels import registry
from .check import Subject


@contextmanager
def forced(module: ModuleType, index: int) -> Iterator[dict[tuple[str, str], tuple[Any, ...]]]:
    """Inside, a kernel module takes the index-th configuration of a list (the last of a shorter one).

    Yields what it was asked for: (operation, key) -> the configurations that can serve it.
    """
    asked: dict[tuple[str, str], tuple[Any, ...]] = {}
    own = module.pick

    def pick(operation: str, key: str, configs: Sequence[Any]) -> Any:
        asked[operation, key] = tuple(configs)
        return configs[min(index, len(configs) - 1)]

    module.pick = pick  # type: ignore[attr-defined]
    try:
        yield asked
    finally:
        module.pick = own  # type: ignore[attr-defined]


def tunable(subject: Subject) -> ModuleType | None:
    """The kernel module of an operation if it picks its configurations from a table."""
    if "triton" not in subject.operation.implementations:
        return None
    for folder, names in registry.FOLDERS.items():
        room = import_module(f"..kernels.{folder}", __package__)
        if any(getattr(room, name) is subject.operation for name in names):
            try:
                module = import_module(f"..kernels.{folder}.kernel", __package__)
            except ImportError:  # Triton is missing
                return None
            return module if hasattr(module, "pick") else None
    return None
