"""Facts: what shall read differently. One `Fact` is one edit request and what is needed to judge it."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError

LISTS = ("paraphrases", "neighbors", "edit_neighbors", "locality", "ripples", "generation_prompts", "references")
_LISTS_OF_TEXTS = ("paraphrases", "neighbors", "generation_prompts", "references")
RIPPLES = (  # the categories of RippleEdits (arXiv 2307.12976)
    *("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing"),
    *("Forgetfulness", "Relation_Specificity"),
)
FIELDS = ("id", "subject", "prompt", "target_new", "target_true", *LISTS)


@dataclass(frozen=True)
class EditNeighbor:
    """A neighbouring fact that an edit may be told to keep: never counted in specificity.

    prompt: with `{}` at the subject, or holding it once
    target: what the model says there and shall go on saying

    Raises `InputError` as `Fact` does.
    """

    subject: str
    prompt: str
    target: str

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "target"):
            _check_text(f"{name} in edit_neighbors", getattr(self, name))
        object.__setattr__(self, "prompt", place_subject(self.prompt, self.subject))
        object.__setattr__(self, "target", self.target.strip())

    @property
    def question(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True)
class Probe:
    """A question about something else with an answer of its own, held out: an edit shall not change what is said."""

    prompt: str
    target: str

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            _check_text(f"{name} in locality", getattr(self, name))
        object.__setattr__(self, "target", self.target.strip())


@dataclass(frozen=True)
class Query:
    """A prompt, and the answers of which each is right (an answer, and what else it is called)."""

    prompt: str
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_text("prompt in ripples", self.prompt)
        targets = _texts("targets in ripples", self.targets)
        if not targets:
            raise InputError("targets in ripples is empty, expected the answers that are right")
        for target in targets:
            _check_text("targets in ripples", target)
        object.__setattr__(self, "targets", tuple(target.strip() for target in targets))


@dataclass(frozen=True)
class Ripple:
    """One test of what follows from an edit, or must not change with it (RippleEdits, arXiv 2307.12976); held out.

    category: one of `RIPPLES`; prompt, targets: as of `Query`, what the edited model shall say
    conditions: what the unedited model has to know for this to say anything of the edit
    others: further questions of the same test; one of all answered right passes it, with `needs_all` only all of them
    """

    category: str
    prompt: str
    targets: tuple[str, ...]
    conditions: tuple[Query, ...] = ()
    others: tuple[Query, ...] = ()
    needs_all: bool = False

    def __post_init__(self) -> None:
        if self.category not in RIPPLES:
            raise InputError(f"category {self.category!r} in ripples, expected one of {', '.join(RIPPLES)}")
        if not isinstance(self.needs_all, bool):
            raise InputError(f"needs_all in ripples is {type(self.needs_all).__name__}, expected true or false")
        object.__setattr__(self, "targets", self.query.targets)
        for name in ("conditions", "others"):
            object.__setattr__(self, name, _objects(f"{name} in ripples", getattr(self, name), Query))

    @property
    def query(self) -> Query:
        return Query(self.prompt, self.targets)

    @property
    def queries(self) -> tuple[Query, ...]:
        """All questions of the test; which of them have to be answered right, `needs_all` says."""
        return (self.query, *self.others)


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
    locality: questions about other things, with answers of their own; held out, for evaluation only
    ripples: what follows from the fact, and what must not; held out, for evaluation only
    generation_prompts: beginnings about the subject that the model goes on from, for the fluency of what it writes
    references: texts about the new object's kind that these are compared with

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
    locality: tuple[Probe, ...] = ()
    ripples: tuple[Ripple, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("subject", "prompt", "target_new"):
            _check_text(name, getattr(self, name))
        if isinstance(self.target_true, str) and not self.target_true.strip():
            raise InputError("target_true is empty; leave the field out where nothing is known")
        if self.target_true is not None:
            _check_text("target_true", self.target_true)
        for name in _LISTS_OF_TEXTS:
            for text in getattr(self, name):
                _check_text(f"a text of {name}", text)
        object.__setattr__(self, "prompt", place_subject(self.prompt, self.subject))
        for name in _LISTS_OF_TEXTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        for name, kind in (("edit_neighbors", EditNeighbor), ("locality", Probe), ("ripples", Ripple)):
            object.__setattr__(self, name, _all_of(kind, name, getattr(self, name)))
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


def held_out(facts: Sequence[Fact]) -> list[tuple[str, ...]]:
    """Of each fact the neighbours that count in specificity: none that any of the facts has for its edit.

    What a fact was edited to keep says nothing of what the edit spares, also where it stands at another fact.
    """
    used = {neighbor.question.strip() for fact in facts for neighbor in fact.edit_neighbors}
    return [tuple(prompt for prompt in fact.neighbors if prompt.strip() not in used) for fact in facts]


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
    for name in _LISTS_OF_TEXTS:
        values[name] = _texts(name, values.get(name))
    for name, kind in (("edit_neighbors", EditNeighbor), ("locality", Probe), ("ripples", Ripple)):
        values[name] = _objects(name, values.get(name), kind)
    identity = values.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int))):
        raise InputError(f"id is {type(identity).__name__}, expected text or a whole number")
    values["id"] = "" if identity is None else str(identity)
    return Fact(**values)


class UnknownField(InputError):
    """A field that no record has: the file is not what it seems, so no record of it is taken."""


def _texts(name: str, value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else (value or [])
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name} is {type(value).__name__}, expected a list of texts")
    return tuple(value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is {type(value).__name__}, expected text")
    if not value.strip():
        raise InputError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may hold them, tokenizers refuse them
        raise InputError(f"{name} holds half of a surrogate pair, expected text: {value!r}") from None


def _objects(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """A `kind` of each object of a record's list, which has the fields of `kind`, all of them and no other."""
    value = value or ()
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name} is {type(value).__name__}, expected a list")
    wanted = [field.name for field in fields(kind)]
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    made = []
    for each in value:
        if not isinstance(each, (Mapping, kind)) or (
            isinstance(each, Mapping) and not needed <= set(each) <= set(wanted)
        ):
            expected = f"{', '.join(wanted[:-1])} and {wanted[-1]}"
            raise InputError(f"{name} holds {each!r}, expected objects with {expected}")
        made.append(kind(**each) if isinstance(each, Mapping) else each)
    return tuple(made)


def _all_of(kind: type, name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    values = tuple(values or ())
    for value in values:
        if not isinstance(value, kind):
            raise InputError(f"{name} holds {value!r}, expected {kind.__name__}")
    return values


def read_text(path: Path) -> str:
    """The whole file, without the byte order mark of Windows. Raises `InputError` where it is no UTF-8 text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) for each line that is not blank. Raises `InputError` with the line number for broken JSON."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
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
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.reader.line_num}: broken CSV ({error})") from None
        where = f"line {reader.line_num}"
        if None in row:
            raise InputError(f"{path}: {where}: more cells than the header has fields")
        record: dict[str, Any] = {key: value for key, value in row.items() if value not in (None, "")}
        for name in LISTS:
            if name in record and record[name].lstrip().startswith("["):
                try:
                    record[name] = json.loads(record[name])
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}: {where}: broken JSON in {name} ({error.msg})") from None
        # an empty cell of a required field is an empty field, not a missing one
        record.update({name: "" for name in ("subject", "prompt", "target_new") if name in row and not row[name]})
        yield where, record
