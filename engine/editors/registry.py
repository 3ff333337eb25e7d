"""Methods by name, and what a method is handed and gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.spd_solve import Factor, KeySystem, NullSpace
from ...stats.ranks import ALONE, Ranks
from ..delta import Factors, Update
from ..facts import Fact
from ..hparams import Hparams
from ..model import Model
from ..objective import BLOCK, Objective
from ..phases import Phases
from .names import known_method


@dataclass(frozen=True)
class Job:
    """One batch of facts to edit.

    contexts: generated context templates
    objective: what values are optimised for
    moments: names of projections -> C of each ([d_in, d_in] float32, mean of k kᵀ on the unedited model); collected
        when first asked
    factor: name -> the `regular_factor` of its C, on the layer's device; made once, then from memory or disk
    space: (name, threshold) -> the null space of its C, likewise
    put: writes a part of one weight's update provisionally and returns the share lost to rounding; kept only if the
        edit is whole
    state: what the method's last edit of this session left (`Outcome.state`), None before the first
    batch_size: facts whose values are optimised at once, None: from the free memory
    cache: the folder that their values are kept in, None: nowhere
    ranks: the processes that share the values; each does the rest by itself
    verified: layers for which the session has found the model to be what its anatomy says
    """

    model: Model
    facts: Sequence[Fact]
    contexts: Sequence[str]
    hparams: Any
    objective: Objective
    moments: Callable[[Sequence[str]], dict[str, Tensor]]
    factor: Callable[[str], Factor]
    space: Callable[[str, float], NullSpace]
    put: Callable[[str, Factors], float]
    phases: Phases
    state: Any = None
    batch_size: int | None = None
    cache: Path | None = None
    ranks: Ranks = ALONE
    verified: set[tuple[int, ...]] = field(default_factory=set)


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
    alone: edits each fact as if it were the only one: (its update, what a report says) of each, and writes nothing;
    site: where its values' variables are; forget: (state, n) -> the state without its last n keys, for an undone edit.
    """

    name: str
    hparams: type[Hparams]
    check: Callable[[Job], None]
    edit: Callable[[Job], Outcome]
    alone: Callable[[Job], tuple[list[Update], list[dict[str, Any]]]]
    site: tuple[str, ...] = (BLOCK,)
    forget: Callable[[Any, int], Any] = lambda state, keys: None


def forget_keys(state: dict[str, KeySystem], keys: int) -> dict[str, KeySystem]:
    """For methods whose state is the keys of all edits, weight by weight."""
    return {name: system.without_last(keys) for name, system in state.items()}


def find_method(name: str) -> Method:
    """By its module beside this one, which has `METHOD`. Raises `InputError` for an unknown one, naming the nearest."""
    method: Method = import_module(f".{known_method(name).replace('-', '_')}", __package__).METHOD
    return method
