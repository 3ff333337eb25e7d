"""Reading facts: our own JSONL and CSV, and the published data sets as they are (one file a format); writing them."""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from ...kernels.errors import InputError
from ..facts import Fact, InvalidFact, to_record
from . import counterfact
from .reading import Reader, again
from .references import read_references
from .validation import Group, Problem, Report, validate
from .zsre import CONVENTIONS

__all__ = [
    "CONVENTIONS",
    "Group",
    "Problem",
    "Report",
    "check_writable",
    "name_invalid",
    "read_facts",
    "scan_candidates",
    "scan_facts",
    "validate",
    "write_facts",
]


def read_facts(
    path: str | Path,
    limit: int | None = None,
    convention: str | None = None,
    *,
    generation: bool = False,
    snippets: str | Path | None = None,
) -> list[Fact]:
    """Facts of a file. Raises `InputError` that names every fact that cannot be edited; see `scan_facts`."""
    facts, invalid = scan_facts(path, limit, convention, generation=generation, snippets=snippets)
    name_invalid(path, invalid)
    return facts


def name_invalid(path: str | Path, invalid: Sequence[InvalidFact]) -> None:
    """Raises `InputError` with every one of them, where there are any."""
    if invalid:
        named = "; ".join(f"{bad.where}: {bad.reason}" for bad in invalid)
        count = "1 fact" if len(invalid) == 1 else f"{len(invalid)} facts"
        raise InputError(f"{path}: {count} cannot be edited (--skip-invalid goes on without): {named}")


def scan_facts(
    path: str | Path,
    limit: int | None = None,
    convention: str | None = None,
    *,
    generation: bool = False,
    snippets: str | Path | None = None,
) -> tuple[list[Fact], list[InvalidFact]]:
    """(facts, records that cannot be edited) of a `.jsonl`, `.csv` or `.json` file, at most the first `limit` records.

    convention: how a zsRE file is read, one of `CONVENTIONS`; needed for one, refused for any other
    generation: multi-CounterFact's `generation_prompts` are read, which no edit needs
    snippets: CounterFact's `attribute_snippets.json`, for the facts' `references`; `generation` goes with it
    Raises `InputError` where the file itself is wrong: missing, empty, broken JSON (with its line), unknown fields.
    """
    references = None if snippets is None else read_references(Path(snippets))
    return _scan(Reader(Path(path), convention, generation=generation, references=references), limit)


def scan_candidates(path: str | Path, limit: int | None = None) -> tuple[list[Fact], list[InvalidFact]]:
    """As `scan_facts`, but `edit_neighbors` holds all that an edit-time neighbour may be chosen from.

    That is what the facts have there, and for multi-CounterFact every neighbour whose subject is known, each of them
    among `neighbors`, too. Such facts are for `engine.neighbors` and not to be edited: nothing would be held out.
    """
    return _scan(Reader(Path(path), candidates=True), limit)


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


def _scan(reader: Reader, limit: int | None) -> tuple[list[Fact], list[InvalidFact]]:
    facts: list[Fact] = []
    invalid: list[InvalidFact] = []
    places: dict[str, str] = {}
    for where, named, found in islice(reader, limit):
        if isinstance(found, InvalidFact):
            invalid.append(found)
            continue
        if found.id in places:
            raise InputError(
                f"{reader.path}: {where}: {again(named, found)}, as in {places[found.id]}; expected each once"
            )
        places[found.id] = where
        facts.append(found)
    return facts, invalid
