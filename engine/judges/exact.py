"""Exact match after normalisation, as published for WILD (arXiv 2502.11177)."""

import re
import string
from collections.abc import Sequence
from typing import Any

from ..phases import Tick
from .claims import Claim

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case; ASCII punctuation gone, nothing in its place; standalone a, an, the; single spaces. In this order.

    So "U.S." is "us", "well-known" is "wellknown", and what is punctuation or articles only comes out empty.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


class ExactMatch:
    """Right is what equals an accepted answer once both are normalised."""

    name = "exact"

    def prepare(self) -> None:
        """Nothing is needed."""

    def describe(self) -> dict[str, Any]:
        steps = ["lower case", "ASCII punctuation deleted", "a, an, the dropped", "white space collapsed"]
        return {"kind": self.name, "normalisation": steps}

    def verdicts(self, claims: Sequence[Claim], progress: Tick = lambda done, total: None) -> list[bool]:
        found = [normalise(claim.answer) in map(normalise, claim.gold) for claim in claims]
        progress(len(claims), len(claims))
        return found
