"""What a session's edits are, once they are made: an edit, its passes, and facts that were each edited alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .delta import Update
from .editors.registry import Outcome
from .facts import Fact
from .scores import perplexity


@dataclass(frozen=True)
class Edit:
    """One applied edit.

    report: everything: phases, iterations, layers, every fact before and after
    keys: that it left in the method's state, where that holds keys
    """

    id: str
    facts: tuple[Fact, ...]
    report: dict[str, Any]
    keys: int


@dataclass(frozen=True)
class Iteration:
    """One pass of an edit (arXiv 2503.11895). Perplexities are exp(nll) of a fact's target over its token rows under
    all templates, those of its neighbours among them where they entered the values.

    number: from 1
    facts: of each: init_ppl (as weights were; of ROME behind the facts before it), opt_ppl (with its delta added),
        spread_ppl (with weights written)
    initial, optimization, spread: their means over facts
    seconds: of each phase
    """

    number: int
    facts: list[dict[str, float]]
    initial: float
    optimization: float
    spread: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Singles:
    """Facts that were each edited alone. updates: of each fact its own; report: what was asked, seconds of each phase,
    and of each fact how its values went."""

    updates: list[Update]
    report: dict[str, Any]


def iteration_of(number: int, outcome: Outcome, spread: Sequence[float], seconds: dict[str, float]) -> Iteration:
    facts = [
        {"init_ppl": perplexity(of["nll_before"]), "opt_ppl": perplexity(of["nll_with_delta"]), "spread_ppl": after}
        for of, after in zip(outcome.facts, spread, strict=True)
    ]

    def mean(name: str) -> float:
        return sum(fact[name] for fact in facts) / len(facts)

    return Iteration(number, facts, mean("init_ppl"), mean("opt_ppl"), mean("spread_ppl"), seconds)


def seconds_since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase that has run since."""
    return {name: round(t - before.get(name, 0.0), 4) for name, t in now.items() if t > before.get(name, 0.0)}
