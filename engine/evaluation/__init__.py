"""Did it work? One file a protocol."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from ...kernels.errors import InputError
from ..facts import Fact
from ..model import Model
from ..phases import Tick
from . import counterfact, underedit

PROTOCOLS: dict[str, Callable[..., dict[str, Any]]] = {
    "counterfact": counterfact.evaluate,
    "underedit": underedit.evaluate,
}


def evaluate(
    model: Model,
    facts: Sequence[Fact],
    protocol: str = "counterfact",
    batch_tokens: int | None = None,
    progress: Tick = lambda done, total: None,
    **more: Any,
) -> dict[str, Any]:
    """{"protocol", "metrics": {name: number}, "facts": [per fact]} of the model as it stands.

    batch_tokens: padded tokens of a forward; None: from the free memory
    more: what the protocol takes besides (`unedited`, `texts` and `compat` of "underedit")
    Raises `InputError` for an unknown protocol.
    """
    return find_protocol(protocol)(model, facts, batch_tokens, progress, **more)


def find_protocol(name: str) -> Callable[..., dict[str, Any]]:
    """Raises `InputError` with the nearest name for an unknown one."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name.lower(), PROTOCOLS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PROTOCOLS)}"
        raise InputError(f"unknown protocol {name!r}; {hint}")
    return PROTOCOLS[name]
