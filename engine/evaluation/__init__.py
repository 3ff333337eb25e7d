"""Did it work? One file a protocol."""

from collections.abc import Sequence
from typing import Any

from ...kernels.errors import InputError
from ..answer_store import AnswerStore
from ..asked import Asked
from ..delta import Update
from ..facts import Fact
from ..model import Model
from ..phases import Tick
from .registry import find_protocol as find_protocol
from .registry import protocol_names as protocol_names


def evaluate(
    model: Model,
    facts: Sequence[Fact],
    protocol: str = "counterfact",
    batch_tokens: int | None = None,
    progress: Tick = lambda done, total: None,
    *,
    batch_size: int | None = None,
    deltas: Sequence[Update] = (),
    store: AnswerStore | None = None,
    **more: Any,
) -> dict[str, Any]:
    """{"protocol", "metrics": {name: number}, "definitions": {name: text}, "facts": [per fact]} of the model as it is.

    batch_tokens: padded tokens of a forward; batch_size: rows of one; None: from the free memory
    deltas: of each fact an update of its own that it is measured under, alone, no weight written; empty: none
    store: where answers are kept as they come, so that an evaluation that was interrupted goes on (`AnswerStore.of`)
    more: what the protocol takes besides (`unedited`, of those that measure against it; see the protocol)
    Raises `InputError` for an unknown protocol, and for an option that it does not take.
    """
    found = find_protocol(protocol)
    known = (*(("unedited",) if found.against else ()), *found.options)
    for name in more:
        if name not in known:
            raise InputError(f"protocol {protocol} takes no {name!r}; it takes {', '.join(known) or 'no options'}")
    if deltas and len(deltas) != len(facts):
        raise InputError(f"{len(deltas)} deltas for {len(facts)} facts; expected one each")
    measured = found.measure(Asked(model, deltas, batch_tokens, batch_size, store), facts, progress, **more)
    return {"protocol": protocol, **measured, "definitions": {**found.metrics, **measured.get("definitions", {})}}
