"""What a page says, whatever folder it was read from: plain data, before any of it is HTML or a picture."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LONGEST = 2000  # characters of a text that the page keeps: what a model says may have no end

WORKED, PARTLY, FAILED, UNKNOWN = "worked", "partly", "failed", "not measured"


@dataclass(frozen=True)
class Metric:
    """A headline number before and behind the edit. rate: a share in [0, 1], drawn as a bar."""

    label: str
    definition: str
    before: float | None
    after: float | None
    rate: bool


@dataclass(frozen=True)
class Reason:
    """Why a fact is not what was asked for.

    label: a few words, to filter by; text: a sentence; makes: FAILED or PARTLY, None: a cause, no failure by itself
    """

    label: str
    text: str
    makes: str | None = None


@dataclass(frozen=True)
class Row:
    """One fact.

    cells: column -> text, number or None; says: (who, text) pairs that an example shows
    measured: False: nothing is known of its success
    """

    cells: dict[str, Any]
    subject: str
    prompt: str
    says: Sequence[tuple[str, str]]
    reasons: Sequence[Reason]
    measured: bool = True

    @property
    def outcome(self) -> str:
        made = {reason.makes for reason in self.reasons}
        if FAILED in made:
            return FAILED
        if PARTLY in made:
            return PARTLY
        return WORKED if self.measured else UNKNOWN


@dataclass(frozen=True)
class Column:
    """Of the table of facts. kind: "text", "rate" or "number"; main: shown at once, the others on demand."""

    key: str
    label: str
    kind: str
    main: bool


@dataclass(frozen=True)
class Phase:
    """floor: seconds that the hardware needs at least, where it is known."""

    name: str
    seconds: float
    floor: float | None


@dataclass(frozen=True)
class Lines:
    """series: label -> a value at each x, None where it is not known; rate: they are shares in [0, 1]."""

    title: str
    caption: str
    x_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float | None]]
    rate: bool


@dataclass(frozen=True)
class Histogram:
    """mark: a value with a line at it, and what it is."""

    title: str
    caption: str
    x_label: str
    values: Sequence[float]
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Curves:
    """A curve a fact over steps, some longer than others; drawn as their median and the middle 80 %."""

    title: str
    caption: str
    x_label: str
    curves: Sequence[Sequence[float]]


Picture = Lines | Histogram | Curves


@dataclass
class Content:
    """kind: edit, experiment, evaluation or run; about: short facts of how it came about, in order.

    groups: heading -> metrics; the first group is the headline
    details: heading -> name -> value, folded away
    left_out: (where, reason) of records that were not edited or measured
    """

    kind: str
    title: str
    about: dict[str, str]
    groups: dict[str, list[Metric]]
    rows: list[Row]
    main: Sequence[str]
    pictures: list[Picture] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    details: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[Column]:
        """Of all rows, in the order of their first appearance, the main ones first."""
        keys = dict.fromkeys([*self.main, *(key for row in self.rows for key in row.cells)])
        columns = []
        for key in keys:
            values = [value for row in self.rows if (value := row.cells.get(key)) is not None]
            if values or key in self.main:
                before = key.removesuffix("_unedited")
                name = f"{label(before)}, before" if before != key and before in keys else label(key)
                columns.append(Column(key, LABELS.get(key, name), _kind(key, values), key in self.main))
        return columns


LABELS = {
    "id": "id",
    "outcome": "outcome",
    "why": "why",
    "question": "prompt",
    "target_new": "new object",
    "target_true": "true object",
    "said_before": "said before",
    "said_after": "said after",
    "answer": "answer",
    "answer_unedited": "answer before",
    "nll_before": "NLL of the new object before",
    "nll_with_delta": "NLL with the target value put in",
    "probability_with_delta": "probability with the target value put in",
    "spread_ppl": "perplexity of the new object after",
    "asked_residual": "residual asked for, |Z - H|",
    "achieved": "share of the residual achieved",
    "delta_norm": "|delta|",
    "relative_delta_norm": "|delta| / |h0|",
    "loss": "last loss",
}
NO_RATES = (
    *("ppl", "perplexity", "magnitude", "entropy", "fluency", "nll", "loss", "norm", "residual", "steps", "seconds"),
    *("tokens", "length", "count", "id", "number", "kl", "bits"),
)


def label(key: str) -> str:
    if key in LABELS:
        return LABELS[key]
    return key.replace("_", " ").replace(" acc", " accuracy") if key.endswith("_acc") else key.replace("_", " ")


def is_rate(key: str, values: Iterable[float]) -> bool:
    """Whether these read as shares; from the name first, since a perplexity of 1 is none."""
    words = key.removesuffix("_unedited").split("_")
    return not any(word in NO_RATES for word in words) and all(0.0 <= value <= 1.0 for value in values)


def _kind(key: str, values: Sequence[Any]) -> str:
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return "text"
    return "rate" if is_rate(key, values) else "number"


def finite(value: Any) -> float | None:
    """A number of a file as one that can be shown: None for what is none, NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def average(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cell(value: Any) -> Any:
    """Any JSON value as one cell: numbers and texts stay, true and false count, anything deeper is written out."""
    if value is None or isinstance(value, bool):
        return None if value is None else int(value)
    if isinstance(value, (int, float)):
        return finite(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = " | ".join(value)
    text = value if isinstance(value, str) else said(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def said(value: Any) -> str:
    """A value of a setting, for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {said(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(said, value))}]"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def short_name(model: Any) -> str:
    """Of a model: the last part of its path or id."""
    return str(model or "a model").rstrip("/").rpartition("/")[2] or "a model"


def facts(count: int) -> str:
    return "1 fact" if count == 1 else f"{count:,} facts"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
