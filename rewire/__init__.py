"""Rewire edits facts in large language models, fast.

The public names are handed out lazily, so that ``import rewire`` costs nothing until something is used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "rewire.engine.model",
    "wrap": "rewire.engine.model",
    "Model": "rewire.engine.model",
    "Fact": "rewire.engine.facts",
    "EditNeighbor": "rewire.engine.facts",
    "Probe": "rewire.engine.facts",
    "Query": "rewire.engine.facts",
    "Ripple": "rewire.engine.facts",
    "read_facts": "rewire.engine.datasets",
    "EditSession": "rewire.engine.session",
    "Edit": "rewire.engine.edits",
    "Singles": "rewire.engine.edits",
    "Delta": "rewire.engine.delta",
    "evaluate": "rewire.engine.evaluation",
    "InputError": "rewire.kernels.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rewire' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
