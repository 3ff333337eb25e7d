"""Facts: what shall read differently. One `Fact` is one edit request and what is needed to judge it."""

import csv
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError

FIELDS = ("id", "subject", "prompt", "target_new", "target_true", "paraphrases", "neighbors", "edit_neighbors")


@dataclass(frozen=True)
class EditNeighbor:
    """A neighbouring fact that an edit may be told to keep: never counted in specificity."""

    subject: str
    prompt: str  # with `{}` at the subject
    target: str


@dataclass(frozen=True)
class Fact:
    """One request: `prompt` (with `{}` where the subject stands) shall continue with `target_new`.

    subject: str, e.g. "Danielle Darrieux"
    prompt: str with exactly one `{}`, e.g. "The mother tongue of {} is"; a prompt that holds the subject once is
        turned into this form
    target_new: str without leading space, e.g. "English"
    target_true: str or None, what the model should have said before; needed to score success
    paraphrases: full prompts that ask the same thing in other words
    neighbors: full prompts about other subjects whose true object is `target_true`; held out, for evaluation only
    edit_neighbors: neighbouring facts for neighbour-assisted editing
    id: str, unique within a file; made from the content where none is given

    Raises `InputError` for an empty field, or a subject that cannot be placed in the prompt.
    """

    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[str, ...] = ()
    edit_neighbors: tuple[EditNeighbor, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InputError(f"{name} is {type(value).__name__}, expected text")
            if not value.strip():
                raise InputError(f"{name} is empty")
        if self.target_true is not None and not self.target_true.strip():
            raise InputError("target_true is empty; leave the field out where nothing is known")
        object.__setattr__(self, "prompt", place_subject(self.prompt, self.subject))
        for name in ("target_new", "target_true"):
            value = getattr(self, name)
            object.__setattr__(self, name, value.strip() if value else value)
        if not self.id:
            digest = hashlib.sha256(f"{self.prompt}\0{self.subject}\0{self.target_new}".encode())
            object.__setattr__(self, "id", digest.hexdigest()[:12])

    @property
    def question(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class InvalidFact:
    """A record that cannot be edited, and why."""

    where: str
    reason: str


def place_subject(prompt: str, subject: str) -> str:
    """`prompt` with `{}` at the subject. Raises `InputError` where that place is missing or not unique."""
    marks = prompt.count("{}")
    if marks == 1:
        return prompt
    if marks > 1:
        raise InputError(f"prompt {prompt!r} has {marks} places marked {{}}, expected one")
    found = prompt.count(subject)
    if found == 1:
        return prompt.replace(subject, "{}")
    if found == 0:
        raise InputError(f"subject {subject!r} does not occur in prompt {prompt!r} and no {{}} marks its place")
    raise InputError(f"subject {subject!r} occurs {found} times in prompt {prompt!r}: mark the place with {{}}")


def digest(facts: Iterable[Fact]) -> str:
    """A short digest of what the facts ask for, in order."""
    content = json.dumps([[f.id, f.prompt, f.subject, f.target_new] for f in facts], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def to_record(fact: Fact) -> dict[str, Any]:
    """The fact as it stands in a JSONL file; `from_record` reads it back."""
    return {key: value for key, value in asdict(fact).items() if value not in (None, (), [])}


def from_record(record: Mapping[str, Any]) -> Fact:
    """A fact from one JSON object or CSV row. Raises `InputError` for unknown fields and wrong types."""
    for key in record:
        if key not in FIELDS:
            near = difflib.get_close_matches(str(key), FIELDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(FIELDS)}"
            raise UnknownField(f"unknown field {key!r}{hint}")
    missing = [name for name in ("subject", "prompt", "target_new") if name not in record]
    if missing:
        raise InputError(f"field {missing[0]!r} is missing")
    values = dict(record)
    for name in ("paraphrases", "neighbors"):
        values[name] = _texts(name, values.get(name))
    values["edit_neighbors"] = tuple(_edit_neighbor(n) for n in values.get("edit_neighbors") or ())
    values["id"] = str(values["id"]) if values.get("id") not in (None, "") else ""
    true = values.get("target_true")
    if true is not None and not isinstance(true, str):
        raise InputError(f"target_true is {type(true).__name__}, expected text")
    return Fact(**values)


class UnknownField(InputError):
    """A field that no record has: the file is not what it seems, so no record of it is taken."""


def _texts(name: str, value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else (value or [])
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in value):
        raise InputError(f"{name} is {value!r}, expected a list of texts")
    return tuple(value)


def _edit_neighbor(value: Any) -> EditNeighbor:
    if not isinstance(value, Mapping) or set(value) != {"subject", "prompt", "target"}:
        raise InputError(f"edit_neighbors holds {value!r}, expected objects with subject, prompt and target")
    return EditNeighbor(value["subject"], place_subject(value["prompt"], value["subject"]), value["target"])


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) for each line that is not blank. Raises `InputError` with the line number for broken JSON."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: {where}: broken JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}: {where}: {type(record).__name__} found, expected a JSON object")
            yield where, record


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) for each row; the header names the fields. Lists stand as JSON, or as one text."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row:
                raise InputError(f"{path}: {where}: more cells than the header has fields")
            record: dict[str, Any] = {key: value for key, value in row.items() if value not in (None, "")}
            for name in ("paraphrases", "neighbors", "edit_neighbors"):
                if name in record and record[name].lstrip().startswith("["):
                    try:
                        record[name] = json.loads(record[name])
                    except json.JSONDecodeError as error:
                        raise InputError(f"{path}: {where}: broken JSON in {name} ({error.msg})") from None
            # an empty cell of a required field is an empty field, not a missing one
            record.update({name: "" for name in ("subject", "prompt", "target_new") if name in row and not row[name]})
            yield where, record
