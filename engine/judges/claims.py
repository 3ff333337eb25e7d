"""What is judged, and what every judge offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...kernels.errors import InputError
from ..phases import Tick


@dataclass(frozen=True)
class Claim:
    """That `answer` answers `question`.

    question: as asked, without an instruction around it
    gold: the accepted answers, one or more
    answer: what the model generated, post-processed (`engine.decoding`); may be empty
    Raises `InputError` where there is no accepted answer.
    """

    question: str
    gold: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if not self.gold:
            raise InputError(f"question {self.question!r}: no accepted answer found; a judge needs one or more")


class Judge(Protocol):
    """name: as `find_judge` knows it"""

    @property
    def name(self) -> str: ...

    def prepare(self) -> None:
        """Raises `InputError` for what is missing, before there is anything to judge."""

    def describe(self) -> dict[str, Any]:
        """For the report: "kind", and whatever else a verdict depends on; no secrets."""

    def verdicts(self, claims: Sequence[Claim], progress: Tick = lambda done, total: None) -> list[bool]:
        """Whether each claim is right, in their order."""
