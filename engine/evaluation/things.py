"""What protocols of questions and answers share: which other things are asked about, and asking all facts at once."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...kernels.errors import InputError
from ..facts import Fact, held_out

Found = TypeVar("Found")


def kept_things(facts: Sequence[Fact], count: int) -> list[list[tuple[str, str]]]:
    """Of each fact the first `count` (question about something else, its answer): its `locality`, then held-out
    neighbours with the true object, where that is known."""
    things = []
    for fact, neighbors in zip(facts, held_out(facts), strict=True):
        of = [(probe.prompt, probe.target) for probe in fact.locality]
        if fact.target_true is not None:
            of += [(prompt, fact.target_true) for prompt in neighbors]
        things.append(of[:count])
    return things


def ask(
    wanted: Sequence[Sequence[tuple[Any, ...]]], answer: Callable[[list[Any]], Sequence[Found]]
) -> list[list[tuple[str, Found]]]:
    """Of each fact's questions (kind, *what is asked) all answers, with their kinds: one call for all facts."""
    flat = [(number, *asked) for number, of in enumerate(wanted) for _, *asked in of]
    answers = iter(answer(flat))
    return [[(kind, next(answers)) for kind, *_ in of] for of in wanted]


def same_facts(
    unedited: dict[str, Any] | None, facts: Sequence[Fact], key: str, things: Sequence[Sequence[Any]]
) -> dict[str, Any] | None:
    """id -> what the unedited model's evaluation has under `key`; None without one.

    things: what each fact is asked there: a list of as many
    Raises `InputError` where it is one of other facts, or was asked otherwise.
    """
    if unedited is None:
        return None
    known = {record["id"]: record.get(key) for record in unedited["facts"]}
    for fact, of in zip(facts, things, strict=True):
        found = known.get(fact.id)
        if found is None or len(found) != len(of):
            raise InputError(
                f"fact {fact.id}: not in what is given as the unedited model's evaluation, or asked otherwise there; "
                "evaluate the unedited model on the same facts, with the same options"
            )
    return known
