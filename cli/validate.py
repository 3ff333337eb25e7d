"""What `rewire evaluate --validate` says of a file of facts, before any model is loaded."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ..engine.datasets import Report, validate
from . import common

EXAMPLES = 3  # of each kind that are shown


def show(path: Path, convention: str | None = None, json: bool = False) -> int:
    """Prints what `validate` finds in the file; the exit status: 0, or 2 where a record cannot be edited or read.

    json: one document on stdout, with every error and warning; what is missing is counted in `groups` alone
    Raises `InputError` where the file itself is wrong.
    """
    report = validate(path, convention)
    if json:
        common.print_json(_document(report))
    else:
        for line in _lines(report):
            common.console().print(line)
    return 2 if report.errors else 0


def _document(report: Report) -> dict[str, object]:
    return {
        "file": report.path,
        "records": report.records,
        "facts": report.facts,
        "errors": report.errors,
        "clean": report.clean,
        "groups": [asdict(group) for group in report.groups(EXAMPLES)],
        "problems": [asdict(found) for found in report.problems if found.severity != "missing"],
    }


def _lines(report: Report) -> Iterator[str | Table]:
    groups = report.groups(EXAMPLES)
    if groups:
        table = Table("", "records", "what", "first ones")
        for group in groups:
            # the same is missing everywhere: an example says nothing
            shown = () if group.severity == "missing" else group.examples
            examples = "\n".join(f"{found.where}: {found.text}" for found in shown)
            table.add_row(group.severity, str(group.count), escape(group.kind), escape(examples))
        yield table
    yield escape(
        f"{report.path}: {common.count(report.records, 'record')}, {report.facts} can be edited, "
        f"{report.clean} with neither error nor warning"
    )
    if any(group.severity != "missing" and group.count > len(group.examples) for group in groups):
        yield "--json names all of them"
