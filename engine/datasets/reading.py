"""One record after another of a file of facts, whatever its form."""

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ..facts import Fact, InvalidFact, UnknownField, from_record, read_csv, read_jsonl, read_text
from . import counterfact, easyedit, qaedit, ripple, zsre
from .zsre import CONVENTIONS

_Convert = Callable[[Mapping[str, Any], int], dict[str, Any]]
# (does this record look like it, its fields under our names); zsRE, nested CounterFact and QAEdit need more to be read
_PUBLISHED: tuple[tuple[Callable[[Mapping[str, Any]], bool], _Convert], ...] = (
    (counterfact.is_flat, counterfact.from_flat),
    (easyedit.is_counterfact, easyedit.from_counterfact),
    (easyedit.is_hallucination, easyedit.from_hallucination),
    (ripple.is_original, ripple.from_original),
    (easyedit.is_knowedit, easyedit.from_knowedit),
    (ripple.is_flat, ripple.from_flat),
)


class _WrongFile(InputError):
    """The file is not what it seems, or not what was asked for: no record of it is taken."""


@dataclass(frozen=True)
class Reader:
    """A file of facts, and how its records are read; see `scan_facts`."""

    path: Path
    convention: str | None = None
    candidates: bool = False
    generation: bool = False
    references: Mapping[tuple[str, str], tuple[str, ...]] | None = None

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any], Fact | InvalidFact]]:
        """(where, its fields under our names as far as they could be told, what it is) of each record.

        Raises `InputError` where the file itself is wrong, but does not look whether a fact stands twice.
        """
        check_convention(self.convention)
        path = self.path
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "no such file"
            raise InputError(f"{path}: {found} (expected facts as .jsonl, .csv or .json)")
        seen: Counter[str] = Counter()  # ids so far, of a data set in which they repeat
        position = -1
        for position, (where, record) in enumerate(_records(path)):
            named: Mapping[str, Any] = {}
            try:
                named = self._fields(record, position, seen)
                yield where, named, from_record(named)
            except _WrongFile as error:
                raise InputError(f"{path}: {where}: {error}") from None
            except UnknownField as error:
                hint = "; nor is it a published data set that Rewire reads" if path.suffix.lower() == ".json" else ""
                raise InputError(f"{path}: {where}: {error}{hint}") from None
            except InputError as error:
                yield where, named, InvalidFact(where, str(error))
        if position < 0:
            raise InputError(f"{path}: no facts in it")

    def _fields(self, record: Mapping[str, Any], position: int, seen: Counter[str]) -> Mapping[str, Any]:
        """The record under our names. Published forms are looked for in `.json` files alone."""
        published = self.path.suffix.lower() == ".json"
        if self.convention is not None and not (published and zsre.is_zsre(record)):
            raise _WrongFile(
                f"--convention {self.convention} is for zsRE, and this is no zsRE record (src, answers); leave it out"
            )
        if self.references is not None and not (published and counterfact.is_nested(record)):
            raise _WrongFile(
                "snippets are found by relation and object, and only CounterFact's records (requested_rewrite) name "
                "them; leave them out"
            )
        if not published:
            return record
        try:
            if zsre.is_zsre(record):
                return self._zsre(record, position)
            if counterfact.is_nested(record):
                asked = self.generation or self.references is not None
                return counterfact.from_nested(record, self.candidates, asked, self.references)
            if qaedit.is_qaedit(record):
                return qaedit.from_qaedit(record, seen)
            return next((convert(record, position) for fits, convert in _PUBLISHED if fits(record)), record)
        except (LookupError, TypeError, AttributeError) as error:
            raise _WrongFile(f"not the format that it looks like ({error!r})") from None

    def _zsre(self, record: Mapping[str, Any], position: int) -> Mapping[str, Any]:
        if self.candidates:
            raise _WrongFile("zsRE, whose questions about other things have answers of their own: no neighbours")
        if self.convention is None:
            named = "; ".join(f"{name} ({what})" for name, what in CONVENTIONS.items())
            raise _WrongFile(f"zsRE, which is read in two ways; say which with --convention: {named}")
        return zsre.from_zsre(record, self.convention, position)


def again(named: Mapping[str, Any], fact: Fact) -> str:
    """What it is that stands twice."""
    return f"id {fact.id!r} again" if "id" in named else "the same fact"


def check_convention(convention: str | None) -> None:
    """Raises `InputError` for one that does not exist."""
    if convention is not None and convention not in CONVENTIONS:
        near = difflib.get_close_matches(convention.lower(), CONVENTIONS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CONVENTIONS)}"
        raise InputError(f"--convention: unknown convention {convention!r}; {hint}")


def _records(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    if path.suffix.lower() == ".json":
        return _read_json(path)
    return read_jsonl(path)


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        records = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        hint = "; one record a line is .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{path}: line {error.lineno}: broken JSON ({error.msg}{hint})") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: {type(records).__name__} found, expected a JSON list of records")
    for number, record in enumerate(records):
        where = f"record {number}"
        if not isinstance(record, dict):
            raise InputError(f"{path}: {where}: {type(record).__name__} found, expected a JSON object")
        yield where, record
