"""Reading facts: our own JSONL and CSV, and the published data sets as they are (one file a format); writing them."""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ..facts import Fact, InvalidFact, UnknownField, from_record, read_csv, read_jsonl, read_text, to_record
from . import counterfact, easyedit, zsre
from .zsre import CONVENTIONS

# (does this record look like it, its fields under our names)
_PUBLISHED: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], dict[str, Any]]], ...] = (
    (counterfact.is_nested, counterfact.from_nested),
    (counterfact.is_flat, counterfact.from_flat),
    (easyedit.is_counterfact, easyedit.from_counterfact),
)


def read_facts(path: str | Path, limit: int | None = None, convention: str | None = None) -> list[Fact]:
    """Facts of a file. Raises `InputError` that names every fact that cannot be edited; see `scan_facts`."""
    facts, invalid = scan_facts(path, limit, convention)
    name_invalid(path, invalid)
    return facts


def name_invalid(path: str | Path, invalid: Sequence[InvalidFact]) -> None:
    """Raises `InputError` with every one of them, where there are any."""
    if invalid:
        named = "; ".join(f"{bad.where}: {bad.reason}" for bad in invalid)
        count = "1 fact" if len(invalid) == 1 else f"{len(invalid)} facts"
        raise InputError(f"{path}: {count} cannot be edited (--skip-invalid goes on without): {named}")


def scan_facts(
    path: str | Path, limit: int | None = None, convention: str | None = None
) -> tuple[list[Fact], list[InvalidFact]]:
    """(facts, records that cannot be edited) of a `.jsonl`, `.csv` or `.json` file, at most the first `limit` records.

    convention: how a zsRE file is read, one of `CONVENTIONS`; needed for one, refused for any other
    Raises `InputError` where the file itself is wrong: missing, empty, broken JSON (with its line), unknown fields.
    """
    if convention is not None and convention not in CONVENTIONS:
        near = difflib.get_close_matches(convention.lower(), CONVENTIONS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CONVENTIONS)}"
        raise InputError(f"--convention: unknown convention {convention!r}; {hint}")
    return _scan(Path(path), limit, convention, False)


def scan_candidates(path: str | Path, limit: int | None = None) -> tuple[list[Fact], list[InvalidFact]]:
    """As `scan_facts`, but `edit_neighbors` holds all that an edit-time neighbour may be chosen from.

    That is what the facts have there, and for multi-CounterFact every neighbour whose subject is known, each of them
    among `neighbors`, too. Such facts are for `engine.neighbors` and not to be edited: nothing would be held out.
    """
    return _scan(Path(path), limit, None, True)


def check_writable(path: Path, facts: Iterable[Fact]) -> None:
    """Raises `InputError` where `write_facts` could not write such facts there."""
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise InputError(f"{path}: expected a name in .jsonl (facts), or .json (CounterFact's flat form)")
    if path.suffix.lower() == ".json":
        for fact in facts:
            counterfact.check_flat(fact)


def write_facts(path: Path, facts: Sequence[Fact]) -> None:
    """Writes a `.jsonl` file of facts, or a `.json` one in CounterFact's flat form (`counterfact.to_flat`), whole."""
    from ...stats.cache import write_whole  # brings torch, which whoever only reads facts does not need

    check_writable(path, facts)
    if path.suffix.lower() == ".json":
        text = json.dumps([counterfact.to_flat(fact, number) for number, fact in enumerate(facts)], indent=1)
    else:
        text = "".join(json.dumps(to_record(fact), ensure_ascii=False) + "\n" for fact in facts)
    write_whole(path, lambda file: file.write(text.encode()))


class _WrongFile(InputError):
    """The file is not what it seems, or not what was asked for: no record of it is taken."""


def _scan(
    path: Path, limit: int | None, convention: str | None, candidates: bool
) -> tuple[list[Fact], list[InvalidFact]]:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found} (expected facts as .jsonl, .csv or .json)")
    facts: list[Fact] = []
    invalid: list[InvalidFact] = []
    places: dict[str, str] = {}
    for position, (where, record) in enumerate(_records(path)):
        if limit is not None and position >= limit:
            break
        try:
            fields = _fields(path, record, position, convention, candidates)
            fact = from_record(fields)
        except _WrongFile as error:
            raise InputError(f"{path}: {where}: {error}") from None
        except UnknownField as error:
            hint = "; nor is it a published data set that Rewire reads" if path.suffix.lower() == ".json" else ""
            raise InputError(f"{path}: {where}: {error}{hint}") from None
        except InputError as error:
            invalid.append(InvalidFact(where, str(error)))
            continue
        if fact.id in places:
            what = f"id {fact.id!r} again" if "id" in fields else "the same fact"
            raise InputError(f"{path}: {where}: {what}, as in {places[fact.id]}; expected each once")
        places[fact.id] = where
        facts.append(fact)
    if not facts and not invalid:
        raise InputError(f"{path}: no facts in it")
    return facts, invalid


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


def _fields(
    path: Path, record: Mapping[str, Any], position: int, convention: str | None, candidates: bool
) -> Mapping[str, Any]:
    """The record under our names. Published forms are looked for in `.json` files alone."""
    published = path.suffix.lower() == ".json"
    if convention is not None and not (published and zsre.is_zsre(record)):
        raise _WrongFile(
            f"--convention {convention} is for zsRE, and this is no zsRE record (src, answers); leave it out"
        )
    if not published:
        return record
    try:
        if zsre.is_zsre(record):
            if candidates:
                raise _WrongFile("zsRE, whose questions about other things have answers of their own: no neighbours")
            if convention is None:
                named = "; ".join(f"{name} ({what})" for name, what in CONVENTIONS.items())
                raise _WrongFile(f"zsRE, which is read in two ways; say which with --convention: {named}")
            return zsre.from_zsre(record, convention, position)
        if candidates and counterfact.is_nested(record):
            return counterfact.from_nested(record, candidates)
        return next((convert(record) for fits, convert in _PUBLISHED if fits(record)), record)
    except (LookupError, TypeError, AttributeError) as error:
        raise _WrongFile(f"not the format that it looks like ({error!r})") from None
