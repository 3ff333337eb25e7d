"""Reading facts: our own JSONL and CSV, and the published data sets as they are (one file a format)."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ..facts import Fact, InvalidFact, UnknownField, from_record, read_csv, read_jsonl, read_text
from . import counterfact, easyedit

# (does this record look like it, its fields under our names)
_PUBLISHED: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any]], dict[str, Any]]], ...] = (
    (counterfact.is_nested, counterfact.from_nested),
    (counterfact.is_flat, counterfact.from_flat),
    (easyedit.is_counterfact, easyedit.from_counterfact),
)


def read_facts(path: str | Path, limit: int | None = None) -> list[Fact]:
    """Facts of a file. Raises `InputError` that names every fact that cannot be edited; see `scan_facts`."""
    facts, invalid = scan_facts(path, limit)
    if invalid:
        named = "; ".join(f"{bad.where}: {bad.reason}" for bad in invalid)
        count = "1 fact" if len(invalid) == 1 else f"{len(invalid)} facts"
        raise InputError(f"{path}: {count} cannot be edited (--skip-invalid goes on without): {named}")
    return facts


def scan_facts(path: str | Path, limit: int | None = None) -> tuple[list[Fact], list[InvalidFact]]:
    """(facts, records that cannot be edited) of a `.jsonl`, `.csv` or `.json` file, at most the first `limit` records.

    Raises `InputError` where the file itself is wrong: missing, empty, broken JSON (with its line), unknown fields.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found} (expected facts as .jsonl, .csv or .json)")
    facts: list[Fact] = []
    invalid: list[InvalidFact] = []
    places: dict[str, str] = {}
    for number, (where, record) in enumerate(_records(path)):
        if limit is not None and number >= limit:
            break
        try:
            fact = from_record(record)
        except UnknownField as error:
            hint = "; nor is it a published data set that Rewire reads" if path.suffix.lower() == ".json" else ""
            raise InputError(f"{path}: {where}: {error}{hint}") from None
        except InputError as error:
            invalid.append(InvalidFact(where, str(error)))
            continue
        if fact.id in places:
            what = f"id {fact.id!r} again" if "id" in record else "the same fact"
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
        try:
            fields = next((convert(record) for fits, convert in _PUBLISHED if fits(record)), record)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: {where}: not the format that it looks like ({error!r})") from None
        yield where, fields
