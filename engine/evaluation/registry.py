"""Protocols by name, and what each is handed and gives back."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...kernels.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """One way to measure.

    measure: (asked: Asked, facts, progress: Tick, **options) -> {"metrics": {name: number or None}, "facts": [a record
        a fact, with its "id"]}; plain lists and numbers, ready for JSON
    metrics: name -> its definition, in a line
    against: it takes `unedited`: what it gave of the unedited model on the same facts, and measures against that
    options: names of what else it takes
    """

    name: str
    measure: Callable[..., dict[str, Any]]
    metrics: Mapping[str, str]
    against: bool = False
    options: tuple[str, ...] = ()


# name -> module beside this one, which has `PROTOCOL`
_PROTOCOLS = ("counterfact", "underedit", "zsre", "synthetic", "wild", "ripple", "perplexity", "drift", "ability")


def find_protocol(name: str) -> Protocol:
    """Raises `InputError` with the nearest name for an unknown one."""
    if name not in _PROTOCOLS:
        near = difflib.get_close_matches(name.lower(), _PROTOCOLS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_PROTOCOLS)}"
        raise InputError(f"unknown protocol {name!r}; {hint}")
    protocol: Protocol = import_module(f".{name}", __package__).PROTOCOL
    return protocol


def protocol_names() -> tuple[str, ...]:
    return _PROTOCOLS
