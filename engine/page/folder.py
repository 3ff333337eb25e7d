"""Which kind of folder it is, and its files as they are."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError
from ..facts import read_text

REPORT, EVALUATION, RECORDS, RESULTS = "report.json", "evaluation.json", "records.jsonl", "results.json"
FIRST = "results_1.json"
# what decides, from the most telling file on: the folder of a run holds those of its edits and evaluations, too
KINDS = {RESULTS: "run", FIRST: "experiment", EVALUATION: "evaluation", REPORT: "edit"}

SEARCHED = 1000  # folders below a wrong one that are looked through for a right one


def kind_of(folder: Path) -> str:
    """edit, experiment, evaluation or run. Raises `InputError` for a folder that is none of these."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}, expected the folder of an edit, an evaluation or a run")
    for name, kind in KINDS.items():
        if (folder / name).is_file():
            return kind
    if (folder / "experiment.yaml").is_file():
        raise InputError(
            f"{folder}: experiment.yaml and no results: nothing is measured yet; "
            f"rewire run {folder / 'experiment.yaml'} goes on"
        )
    below = next((path for path, _, names in islice(os.walk(folder), SEARCHED) if set(names) & set(KINDS)), None)
    if below is not None:
        raise InputError(f"{folder}: no report's files here, but below it; try rewire report {below}")
    there = sorted(path.name for path in folder.iterdir())
    found = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "") if there else "nothing"
    raise InputError(
        f"{folder}: {found} found, expected the folder of an edit (with {REPORT}), "
        f"an evaluation ({EVALUATION}) or a run ({RESULTS}, {FIRST})"
    )


def read_object(path: Path) -> dict[str, Any]:
    """Raises `InputError` where the file is no JSON object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: {type(content).__name__} found, expected a JSON object")
    return content


def read_list(path: Path) -> list[dict[str, Any]]:
    """Raises `InputError` where the file is no JSON list of objects."""
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise InputError(f"{path}: expected a JSON list of objects")
    return content


def read_edits(path: Path) -> list[dict[str, Any]]:
    """The reports of the edits in an edit's report.json, at least one."""
    edits = read_object(path).get("edits")
    if not isinstance(edits, list) or not edits or not all(isinstance(edit, dict) for edit in edits):
        raise InputError(f"{path}: no `edits` in it, expected the report of an edit")
    return edits


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file. Raises `InputError` with the line that is broken."""
    for place, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {place}: broken JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}: line {place}: {type(record).__name__} found, expected an object")
        yield record


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: broken JSON ({error.msg})") from None
