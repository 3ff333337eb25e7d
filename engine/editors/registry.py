"""Methods by name, and what a method is handed and gives back."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.errors import InputError
from ...kernels.spd_solve import Factor, NullSpace
from ...stats.ranks import ALONE, Ranks
from ..delta import Factors
from ..facts import Fact
from ..hparams import Hparams
from ..model import Model
from ..phases import Phases


@dataclass(frozen=True)
class Job:
    """One batch of facts to edit.

    contexts: generated context templates
    moments: layers -> C of each ([d_in, d_in] float32, mean of k kᵀ on the unedited model); collected when first asked
    factor: layer -> the `regular_factor` of its C, on the layer's device; made once, then from memory or disk
    space: (layer, threshold) -> the null space of its C, likewise
    put: writes one weight's update provisionally and returns the share lost to rounding; kept only if the edit is whole
    state: what the method's last edit of this session left (`Outcome.state`), None before the first
    batch_size: facts whose values are optimised at once, None: from the free memory
    cache: the folder that their values are kept in, None: nowhere
    ranks: the processes that share the values; each does the rest by itself
    """

    model: Model
    facts: Sequence[Fact]
    contexts: Sequence[str]
    hparams: Any
    moments: Callable[[Sequence[int]], dict[int, Tensor]]
    factor: Callable[[int], Factor]
    space: Callable[[int, float], NullSpace]
    put: Callable[[str, Factors], float]
    phases: Phases
    state: Any = None
    batch_size: int | None = None
    cache: Path | None = None
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Outcome:
    """What a method did: the update of each weight, what the report says of each fact, each layer and the values, and
    what the next edit of the session builds on (`state`; undone with the edit)."""

    update: dict[str, Factors]
    facts: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    state: Any = None
    values: dict[str, Any] | None = None


@dataclass(frozen=True)
class Method:
    """check: raises `InputError` for what cannot be edited, before the long work; edit: does it, through `job.put`;
    forget: (state, n) -> the state without its last n facts, for an undone edit."""

    name: str
    hparams: type[Hparams]
    check: Callable[[Job], None]
    edit: Callable[[Job], Outcome]
    forget: Callable[[Any, int], Any] = lambda state, facts: None


_METHODS = {"memit": "memit", "alphaedit": "alphaedit"}  # name -> module beside this one, which has `METHOD`


def find_method(name: str) -> Method:
    """Raises `InputError` with the nearest name for an unknown one."""
    if name not in _METHODS:
        near = difflib.get_close_matches(name.lower(), _METHODS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_METHODS)}"
        raise InputError(f"unknown method {name!r}; {hint}")
    method: Method = import_module(f".{_METHODS[name]}", __package__).METHOD
    return method


def method_names() -> list[str]:
    return list(_METHODS)
